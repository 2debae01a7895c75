"""Every option of a decoding, with its meaning, its default and its check.

`spd_generate(**options)` and the options of `python -m dmax_kernels generate` are these fields.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass
from functools import partial
from types import ModuleType
from typing import Any

from torch import Tensor

from dmax_kernels._checks import (
    document_fields,
    one_of,
    option,
    read_integer,
    read_number,
    require,
)
from dmax_kernels._numbers import as_integer, shown
from dmax_kernels.decoding.embedding import check_model
from dmax_kernels.models.end_tokens import end_token_ids
from dmax_kernels.ops.spd_step import SEMANTICS

CONVERGENCE = ("both", "consistency", "confidence")
OPS = {"fused": "dmax_kernels", "reference": "dmax_kernels.reference"}
MAX_TOP_K = 8  # of topk_confidence
# How the options of a sample are read, which may differ from prompt to prompt
SAMPLING: dict[str, Callable[..., float]] = {
    "temperature": partial(
        read_number, need="0 or in [1e-30, 1e30]", accepts=lambda t: t == 0 or 1e-30 <= t <= 1e30
    ),
    "sample_top_k": partial(read_integer, need="an integer in [0, 2^24]", least=0, below=2**24 + 1),
    "top_p": partial(read_number, need="in [1e-30, 1]", accepts=lambda p: 1e-30 <= p <= 1),
    "min_p": partial(read_number, need="in [0, 1]", accepts=lambda p: 0 <= p <= 1),
    "seed": partial(read_integer, need="an integer in [0, 2^63)", least=0, below=2**63),
}
FILTERS_OFF = {"sample_top_k": 0, "top_p": 1, "min_p": 0}
# The same of the penalties, which hold for greedy answers too
PENALTIES: dict[str, Callable[..., float]] = {
    "repetition_penalty": partial(
        read_number, need="in [1e-30, 1e30]", accepts=lambda r: 1e-30 <= r <= 1e30
    ),
    "presence_penalty": partial(
        read_number, need="in [-1e30, 1e30]", accepts=lambda p: abs(p) <= 1e30
    ),
    "frequency_penalty": partial(
        read_number, need="in [-1e30, 1e30]", accepts=lambda f: abs(f) <= 1e30
    ),
}
PENALTIES_OFF = {"repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0}


@document_fields
@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """How to decode. The defaults are the paper's except for `semantics`.

    A mistake is a ValueError of one sentence. The rule is looked up by `rules.find_rule`.
    """

    max_new_tokens: int = option(
        MISSING, "length of each answer; decoding runs to the end of the block in which it falls"
    )
    block_length: int = option(
        32, "positions that are decoded together; use the length the model was trained with"
    )
    tau_dec: float = option(
        0.5, "a masked position is promoted when its confidence is greater than this"
    )
    tau_acc: float = option(
        0.9, "a block is accepted when all of its confidences are greater than this"
    )
    rule: object = option(
        "spd",
        "spd; an ablation of it: hybrid (no prefix), hard_prefix, hard (tokens instead of soft "
        "embeddings), threshold (no revision: tau_acc and convergence do not apply); or another "
        "decoder: factor, hierarchical, top_n, autoregressive, random, entropy_bound, margin, "
        "uniform, parallel_forced, local_leap, prophet, sched, credit, edit (token editing, for "
        "models trained for it). In Python also an instance of a rule's class, which has its "
        "options (Hierarchical(low_threshold=0.4)), or a Rule of your own",
    )
    semantics: str = option(
        "settled",
        "when repeated predictions end a block. settled: if no mask was left before the step. "
        "paper: always, which is line 12 of Algorithm 1 to the letter; near tau_dec 1 that is "
        "faster and less accurate (docs/semantics.md). released: as in the authors' code, which "
        "may leave mask tokens in the result when tau_dec > tau_acc",
    )
    top_k: int = option(
        1, f"candidates that a soft embedding mixes, 1 to {MAX_TOP_K} (the paper mixes 1)"
    )
    convergence: str = option(
        "both",
        "what ends a block: both criteria, or one alone (the paper's Table 4). consistency: the "
        "same predictions twice in a row; confidence: all of them above tau_acc",
    )
    suppress_mask: bool = option(True, "never predict the mask token itself")
    max_steps_per_block: int | None = option(
        None,
        "steps after which a block is committed with its current predictions (default: the block "
        "length; with rule edit, its edits more)",
    )
    temperature: float | Iterable[float] = option(
        0.0,
        "sample at this temperature; 0 is greedy. In Python this and the next four are numbers, or "
        "one for each prompt",
    )
    sample_top_k: int | Iterable[int] = option(
        0, "sample from the k most probable tokens; 0 for all"
    )
    top_p: float | Iterable[float] = option(
        1.0, "sample from the fewest tokens whose share of the probability is at least this"
    )
    min_p: float | Iterable[float] = option(
        0.0, "sample from tokens with at least this times the largest probability"
    )
    seed: int | Iterable[int] = option(
        0,
        "of the samples. An answer depends on its own prompt, options and seed alone, so equal "
        "prompts need seeds of their own to be answered differently",
    )
    repetition_penalty: float | Iterable[float] = option(
        1.0,
        "divide a positive logit by this, and multiply another by it, if the token is in the "
        "prompt or the output. In Python this and the next two are numbers, or one for each prompt",
    )
    presence_penalty: float | Iterable[float] = option(
        0.0,
        "subtract this from the logit of a token that is in the output. A token is in the output "
        "once it is final: when its block is committed or, by a rule that keeps a token once it is "
        "decoded, as soon as it is decoded",
    )
    frequency_penalty: float | Iterable[float] = option(
        0.0, "subtract this for each time that the token is in the output"
    )
    logit_bias: object = option(
        None,
        "add a number to a token's logit, before the penalties. In Python a mapping from token ids "
        "to numbers or a float tensor [V], or a list of one for each prompt (None for none) or a "
        "tensor [B, V]",
        repeated="ID=NUMBER",
    )
    mask_token_id: int | None = option(None, "the mask token (default: the model config's)")
    eos_token_id: int | Iterable[int] | None = option(
        None,
        "what ends an answer, in Python one id or several (default: each that the tokenizer or "
        "the model's configs name); an id outside the vocabulary, such as -1, ends none",
    )
    pad_token_id: int | None = option(
        None,
        "what fills a sequence after its end, a token of the vocabulary (default: the model "
        "config's, or else the first end token)",
    )
    ops: str = option("fused", "fused: this package's kernels; reference: eager PyTorch")
    use_cache: bool = option(
        True, "keep keys and values of committed blocks; otherwise forward whole sequences"
    )
    shifted_logits: bool = option(
        False,
        "the model's logits at a position predict the next one, as those of an autoregressive "
        "model do (Dream, Fast-dLLM v2). With a cache, every pass then forwards the block before "
        "too, whose last position predicts the first of the block",
    )
    cuda_graph: bool | None = option(
        None,
        "capture forward pass and step as one CUDA graph, and fail where the model does not allow "
        "it (default: on a GPU, capture where the model allows it)",
    )
    poll_lag: int = option(
        0,
        "steps that the host may launch before it looks which rows have converged. 0 waits for "
        "each step; 1 keeps a GPU busy where a step takes less time than the host's part of it, "
        "at the cost of one more pass per block. The tokens are the same",
    )

    def __post_init__(self) -> None:
        positive = "a positive integer"
        self._keep_integer("max_new_tokens", positive)
        self._keep_integer("block_length", positive)
        for name in ("tau_dec", "tau_acc"):
            value = read_number(
                f"spd_generate: {name}", getattr(self, name), "in [0, 1]", lambda x: 0 <= x <= 1
            )
            object.__setattr__(self, name, value)
        for name, names in (("semantics", SEMANTICS), ("convergence", CONVERGENCE), ("ops", OPS)):
            value = getattr(self, name)
            require(value in names, f"spd_generate: {name}", one_of(names), repr(value))
        self._keep_integer("top_k", f"an integer in [1, {MAX_TOP_K}]", below=MAX_TOP_K + 1)
        self._keep_integer("max_steps_per_block", f"{positive} or None")
        self._keep_integer("mask_token_id", "a token id", least=None)
        self._keep_integer("pad_token_id", "a token id", least=None)
        self._keep_integer("poll_lag", "a non-negative integer", least=0)
        self._keep_sampling()
        for name, read in PENALTIES.items():
            value = read_each(getattr(self, name), partial(read, f"spd_generate: {name}"))
            object.__setattr__(self, name, value)
        object.__setattr__(self, "logit_bias", read_bias(self.logit_bias))
        if self.eos_token_id is not None:
            ids = read_ids("eos_token_id", self.eos_token_id)
            object.__setattr__(self, "eos_token_id", ids)

    def _keep_integer(self, name: str, need: str, **bounds: int | None) -> None:
        """Keep a number as Python's own, whatever library it came from, or a blank as it is."""
        value = getattr(self, name)
        if value is not None or getattr(DecodeConfig, name, MISSING) is not None:
            number = read_integer(f"spd_generate: {name}", value, need, **bounds)
            object.__setattr__(self, name, number)  # frozen, but not yet made

    def _keep_sampling(self) -> None:
        for name, read in SAMPLING.items():  # the temperature first
            what = f"spd_generate: {name}"
            value = read_each(getattr(self, name), partial(read, what))
            object.__setattr__(self, name, value)
            if name in FILTERS_OFF and not self.samples:
                off = FILTERS_OFF[name]
                applied = any(each != off for each in as_tuple(value))
                require(not applied, what, f"{off} where temperature is 0", value)
        require(
            not self.samples or self.top_k == 1,
            "spd_generate: top_k",
            "1 where tokens are sampled, as a soft embedding then holds the sample",
            self.top_k,
        )

    @property
    def samples(self) -> bool:
        """Whether any prompt's answer is sampled."""
        return any(each > 0 for each in as_tuple(self.temperature))

    def for_model(self, model: Any) -> RunConfig:
        """Fill in what the model's config knows, and check the rest against the model."""
        vocabulary = check_model(model)
        mask = self.mask_token_id
        if mask is None:
            mask = getattr(model.config, "mask_token_id", None)
        if mask is None:
            raise ValueError(
                "spd_generate: the model has no mask token (config.mask_token_id); pass "
                "mask_token_id, or use a model trained for masked diffusion"
            )
        in_vocabulary = f"in [0, {vocabulary}), the model's vocabulary"
        mask = read_integer("spd_generate: mask_token_id", mask, in_vocabulary, 0, vocabulary)
        ends = self.eos_token_id
        ends = end_token_ids(model) if ends is None else read_ids("eos_token_id", ends)
        pad = self.pad_token_id
        if pad is None:  # in a config, an id outside the vocabulary (often -1) stands for none
            known = map(as_integer, (getattr(model.config, "pad_token_id", None), *ends, mask))
            pad = next(each for each in known if each is not None and 0 <= each < vocabulary)
        pad = read_integer("spd_generate: pad_token_id", pad, in_vocabulary, 0, vocabulary)
        filled = {
            "mask_token_id": mask,
            "eos_token_id": ends,
            "pad_token_id": pad,
            "max_steps_per_block": self.max_steps_per_block or self.block_length,
        }
        return RunConfig(**{**vars(self), **filled})


@dataclass(frozen=True, kw_only=True)
class RunConfig(DecodeConfig):
    """A `DecodeConfig` without blanks, for one model: what the loop and the rules read."""

    mask_token_id: int
    eos_token_id: tuple[int, ...]
    pad_token_id: int
    max_steps_per_block: int

    @property
    def suppress_token(self) -> int:
        """The token that is never predicted; -1 for none."""
        return self.mask_token_id if self.suppress_mask else -1

    @property
    def functions(self) -> ModuleType:
        """`dmax_kernels` or `dmax_kernels.reference`, which have the same functions."""
        return importlib.import_module(OPS[self.ops])


def as_tuple(value: Any) -> tuple[Any, ...]:
    """One value, or several, as a tuple."""
    return value if isinstance(value, tuple) else (value,)


def read_each(value: Any, read: Callable[[Any], Any]) -> Any:
    """read(value), or that of each value of a sequence or a 1-D tensor, as a tuple."""
    if getattr(value, "ndim", 0) == 1:
        value = value.tolist()
    several = isinstance(value, Sequence) and not isinstance(value, str)
    return tuple(map(read, value)) if several else read(value)


def read_bias(value: Any) -> Any:
    """logit_bias as a dict of Python's numbers or a tensor, or a tuple of these; None for none."""
    what, need = "spd_generate: logit_bias", "in [-1e30, 1e30]"
    if value is None:
        return None
    if isinstance(value, Mapping):
        bias = {}
        for token, number in value.items():
            token = read_integer(f"{what}: a token", token, "an id of at least 0", least=0)
            bias[token] = read_number(what, number, need, lambda b: abs(b) <= 1e30)
        return bias or None
    if isinstance(value, Tensor):
        fits = value.is_floating_point() and value.dim() in (1, 2)
        got = f"{value.dtype}, {list(value.shape)}"
        require(fits, what, "a float tensor [V] or [B, V] where it is a tensor", got)
        outside = value[~(value.abs() <= 1e30)].tolist()
        require(not outside, what, need, next(iter(outside), None))
        return value
    several = isinstance(value, (list, tuple)) and all(
        each is None or isinstance(each, Mapping) or (isinstance(each, Tensor) and each.dim() == 1)
        for each in value
    )
    form = "a mapping from token ids to numbers, a float tensor, or a list of one for each prompt"
    require(several, what, form, shown(value))
    return tuple(map(read_bias, value))


def read_ids(name: str, value: Any) -> tuple[int, ...]:
    """One token id, or several."""
    single = as_integer(value)
    if single is not None:
        return (single,)
    try:
        ids = [as_integer(each) for each in value]
    except TypeError:
        ids = [None]
    require(None not in ids, f"spd_generate: {name}", "a token id or several", shown(value))
    return tuple(each for each in ids if each is not None)
