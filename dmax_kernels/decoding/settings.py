"""The arguments of `spd_generate`, checked once; a mistake gives one sentence that names it."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dmax_kernels._numbers import as_integer, as_number, shown
from dmax_kernels.decoding.named_rules import RULES
from dmax_kernels.decoding.rule import Rule
from dmax_kernels.models.end_tokens import end_token_ids
from dmax_kernels.ops.spd_step import SEMANTICS

CONVERGENCE = ("both", "consistency", "confidence")
OPS = {"fused": "dmax_kernels", "reference": "dmax_kernels.reference"}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


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
        raise ValueError(f"spd_generate: {argument} must be {need}, got {got}")


def one_of(names: Iterable[object]) -> str:
    return "one of " + ", ".join(repr(name) for name in names)


def resolve_settings(
    model: Any,
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
    block_length = read_integer("block_length", block_length, "a positive integer")
    max_new_tokens = read_integer("max_new_tokens", max_new_tokens, "a positive integer")
    tau_dec, tau_acc = read_share("tau_dec", tau_dec), read_share("tau_acc", tau_acc)
    known = isinstance(rule, Rule) or rule in RULES
    require(known, "rule", f"{one_of(RULES)}, or a Rule", repr(rule))
    require(semantics in SEMANTICS, "semantics", one_of(SEMANTICS), repr(semantics))
    require(convergence in CONVERGENCE, "convergence", one_of(CONVERGENCE), repr(convergence))
    require(ops in OPS, "ops", one_of(OPS), repr(ops))
    top_k = read_integer("top_k", top_k, "an integer in [1, 8]", below=9)
    if max_steps_per_block is None:
        max_steps_per_block = block_length
    max_steps_per_block = read_integer(
        "max_steps_per_block", max_steps_per_block, "a positive integer or None"
    )
    if semantics == "released":
        require(
            rule in ("spd", RULES["spd"]) and convergence == "both",
            "semantics",
            "'settled' or 'paper' unless rule is 'spd' and convergence is 'both'",
            f"'released' with rule '{rule}' and convergence '{convergence}'",
        )

    config = model.config
    vocabulary = check_model(model)
    if mask_token_id is None:
        mask_token_id = getattr(config, "mask_token_id", None)
    if mask_token_id is None:
        raise ValueError(
            "spd_generate: the model has no mask token (config.mask_token_id); pass mask_token_id, "
            "or use a model trained for masked diffusion"
        )
    in_vocabulary = f"in [0, {vocabulary}), the model's vocabulary"
    mask_token_id = read_integer(
        "mask_token_id", mask_token_id, in_vocabulary, least=0, below=vocabulary
    )

    eos_token_ids = (
        end_token_ids(model)
        if eos_token_id is None
        else read_integers("eos_token_id", eos_token_id)
    )
    if pad_token_id is None:
        pad_token_id = getattr(config, "pad_token_id", None)
    if pad_token_id is None:
        pad_token_id = eos_token_ids[0] if eos_token_ids else mask_token_id
    pad_token_id = read_integer("pad_token_id", pad_token_id, "a token id", least=None)

    return Settings(
        block_length=block_length,
        max_new_tokens=max_new_tokens,
        tau_dec=tau_dec,
        tau_acc=tau_acc,
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


def check_model(model: Any) -> int:
    """The size of the vocabulary, of a model that the step after the forward pass can read."""
    weight: Any = getattr(model.get_input_embeddings(), "weight", None)
    got = "no weight"
    if weight is not None:
        got = f"{type(weight).__name__} of {weight.dtype}, {list(weight.shape)}"
    # A quantised head is fine: the model's own forward makes logits of it. The embedding is read
    # by the step itself, whose hybrid embeddings mix its rows.
    require(
        weight is not None and weight.dim() == 2 and weight.dtype in FLOATS,
        "the model's input embedding",
        "a float32, bfloat16 or float16 table [V, D]; load it without quantising the embedding",
        got,
    )
    # LLaDA2's remote code reads a 4-D mask as 1 = attend in eager attention, as added in sdpa's
    attention = getattr(model.config, "_attn_implementation", None)
    if getattr(model.config, "model_type", "").startswith("llada2"):
        require(
            attention == "sdpa",
            "the model's attention",
            "'sdpa' (from_pretrained(..., attn_implementation='sdpa')), which adds its 4-D mask",
            repr(attention),
        )
    return weight.shape[0]


def row_thresholds(
    thresholds: Tensor | Sequence[Sequence[float]] | None, settings: Settings, rows: int
) -> Tensor:
    """float32 [B, 2] on the CPU: each row's (tau_dec, tau_acc)."""
    if thresholds is None:
        pair = torch.tensor([[settings.tau_dec, settings.tau_acc]], dtype=torch.float32)
        return pair.repeat(rows, 1)
    table = torch.as_tensor(thresholds, dtype=torch.float32).cpu()
    need = f"[{rows}, 2]: (tau_dec, tau_acc) of each row"
    require(table.shape == (rows, 2), "thresholds", need, list(table.shape))
    outside = table[~((table >= 0) & (table <= 1))]
    require(len(outside) == 0, "thresholds", "in [0, 1]", next(iter(outside.tolist()), None))
    return table


def read_integer(
    argument: str, value: object, need: str, least: int | None = 1, below: int | None = None
) -> int:
    """The integer that an argument is, of Python, NumPy or a tensor; in [least, below)."""
    number = as_integer(value)
    require(
        number is not None
        and (least is None or number >= least)
        and (below is None or number < below),
        argument,
        need,
        shown(value),
    )
    assert number is not None
    return number


def read_integers(argument: str, value: Any) -> tuple[int, ...]:
    """One token id, or several."""
    single = as_integer(value)
    if single is not None:
        return (single,)
    try:
        ids = [as_integer(each) for each in value]
    except TypeError:
        ids = [None]
    require(None not in ids, argument, "a token id or several", shown(value))
    return tuple(each for each in ids if each is not None)


def read_share(argument: str, value: object) -> float:
    number = as_number(value)
    require(number is not None and 0 <= number <= 1, argument, "in [0, 1]", shown(value))
    assert number is not None
    return number
