"""The arguments of `generate`, checked once; a mistake gives one sentence that names it."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import Tensor

from dmax_kernels.decoding.rule import Rule
from dmax_kernels.decoding.rules import RULES

SEMANTICS = ("paper", "released")
CONVERGENCE = ("both", "consistency", "confidence")
OPS = {"fused": "dmax_kernels", "reference": "dmax_kernels.reference"}


@dataclass(frozen=True)
class Settings:
    """What a decoding run keeps fixed."""

    block_length: int
    max_new_tokens: int
    tau_dec: float
    tau_acc: float
    mask_token_id: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    rule: Rule
    semantics: str
    top_k: int
    convergence: str
    suppress_token: int
    max_steps_per_block: int
    ops: ModuleType  # dmax_kernels or dmax_kernels.reference: the same function names


def require(condition: bool, argument: str, need: str, got: object) -> None:
    if not condition:
        raise ValueError(f"generate: {argument} must be {need}, got {got}")


def one_of(names: Iterable[str]) -> str:
    return "one of " + ", ".join(repr(name) for name in names)


def resolve_settings(
    model: Any,
    input_ids: Tensor,
    *,
    block_length: int,
    max_new_tokens: int,
    tau_dec: float,
    tau_acc: float,
    mask_token_id: int | None,
    eos_token_id: int | Iterable[int] | None,
    pad_token_id: int | None,
    rule: str | Rule,
    semantics: str,
    top_k: int,
    convergence: str,
    suppress_mask: bool,
    max_steps_per_block: int | None,
    ops: str,
) -> Settings:
    """Check the arguments against each other and the model; fill in what its config knows."""
    require(input_ids.dim() == 2, "input_ids", "2-D [B, T]", f"{input_ids.dim()}-D")
    is_integer = not (input_ids.is_floating_point() or input_ids.is_complex())
    require(is_integer, "input_ids", "integer token ids", input_ids.dtype)
    require(input_ids.shape[0] > 0, "input_ids", "at least one row", "0 rows")
    require(
        input_ids.shape[1] > 0,
        "input_ids",
        "at least one prompt token",
        "an empty prompt",
    )
    for name, count in (
        ("block_length", block_length),
        ("max_new_tokens", max_new_tokens),
    ):
        require(is_count(count), name, "a positive integer", count)
    for name, tau in (("tau_dec", tau_dec), ("tau_acc", tau_acc)):
        require(0 <= tau <= 1, name, "in [0, 1]", tau)
    known = isinstance(rule, Rule) or rule in RULES
    require(known, "rule", f"{one_of(RULES)}, or a Rule", repr(rule))
    require(semantics in SEMANTICS, "semantics", one_of(SEMANTICS), repr(semantics))
    require(
        convergence in CONVERGENCE,
        "convergence",
        one_of(CONVERGENCE),
        repr(convergence),
    )
    require(ops in OPS, "ops", one_of(OPS), repr(ops))
    require(is_count(top_k) and top_k <= 8, "top_k", "an integer in [1, 8]", top_k)
    if max_steps_per_block is None:
        max_steps_per_block = block_length
    require(
        is_count(max_steps_per_block),
        "max_steps_per_block",
        "a positive integer or None",
        max_steps_per_block,
    )
    if semantics == "released":
        require(
            rule in ("spd", RULES["spd"]) and convergence == "both",
            "semantics",
            "'paper' unless rule is 'spd' and convergence is 'both'",
            f"'released' with rule '{rule}' and convergence '{convergence}'",
        )

    config = model.config
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if mask_token_id is None:
        mask_token_id = getattr(config, "mask_token_id", None)
    if mask_token_id is None:
        raise ValueError(
            "generate: the model has no mask token (config.mask_token_id); pass mask_token_id, or "
            "use a model trained for masked diffusion"
        )
    in_vocabulary = f"in [0, {vocabulary}), the model's vocabulary"
    require(0 <= mask_token_id < vocabulary, "mask_token_id", in_vocabulary, mask_token_id)
    # Read back once per call, not per step: an id out of range would fault inside the embedding
    lowest, highest = (int(bound) for bound in input_ids.aminmax())
    require(lowest >= 0, "input_ids", in_vocabulary, lowest)
    require(highest < vocabulary, "input_ids", in_vocabulary, highest)

    length = -(-(input_ids.shape[1] + max_new_tokens) // block_length) * block_length
    context = getattr(config, "max_position_embeddings", None)
    if context is not None and length > context:
        raise ValueError(
            f"generate: a prompt of {input_ids.shape[1]} tokens and "
            f"max_new_tokens={max_new_tokens} need {length} positions in whole blocks of "
            f"{block_length}, but the model's context is {context} (config.max_position_embeddings)"
        )

    if eos_token_id is None:
        eos_token_id = getattr(config, "eos_token_id", None)
    if eos_token_id is None:
        eos_token_id = ()
    eos_token_ids = (eos_token_id,) if isinstance(eos_token_id, int) else tuple(eos_token_id)
    if pad_token_id is None:
        pad_token_id = getattr(config, "pad_token_id", None)
    if pad_token_id is None:
        pad_token_id = eos_token_ids[0] if eos_token_ids else mask_token_id

    return Settings(
        block_length=block_length,
        max_new_tokens=max_new_tokens,
        tau_dec=float(tau_dec),
        tau_acc=float(tau_acc),
        mask_token_id=mask_token_id,
        eos_token_ids=eos_token_ids,
        pad_token_id=pad_token_id,
        rule=rule if isinstance(rule, Rule) else RULES[rule],
        semantics=semantics,
        top_k=top_k,
        convergence=convergence,
        suppress_token=mask_token_id if suppress_mask else -1,
        max_steps_per_block=max_steps_per_block,
        ops=importlib.import_module(OPS[ops]),
    )


def is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
