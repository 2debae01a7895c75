"""Sampled tokens and their probabilities, whole or from vocabulary shards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dmax_kernels.ops._register import empty_per_row, register_fake, register_not_differentiable
from dmax_kernels.vocabulary import visible_tokens

DRAW_TILE = 64  # kDrawTile of csrc/common/constants.h


class Sample(NamedTuple):
    """A token per row and what the row's softmax says of it."""

    token: Tensor
    probability: Tensor
    top1_probability: Tensor
    relative_confidence: Tensor


def stack_options(
    op: str, like: Tensor, shape: torch.Size, meaning: str, options: dict[str, Tensor | float]
) -> Tensor:
    """Options, some of them tensors of this shape on like's device, as one float32 [*shape, n]."""
    columns = []
    for name, option in options.items():
        if not isinstance(option, Tensor):
            columns.append(like.new_full(shape, option, dtype=torch.float32))
            continue
        if option.shape != shape or option.device != like.device:
            raise ValueError(
                f"{op}: {name} must be a number or a tensor {list(shape)} on {like.device}, "
                f"{meaning}, got {list(option.shape)} on {option.device}"
            )
        columns.append(option.to(torch.float32))
    return torch.stack(columns, dim=-1)


def row_options(op: str, rows_name: str, rows: Tensor, **options: Tensor | float) -> dict[str, Any]:
    """The op's options: four numbers, or one float32 [..., 4] if any of them is a tensor [...]."""
    if not any(isinstance(option, Tensor) for option in options.values()):
        return options
    stacked = stack_options(op, rows, rows.shape[:-1], f"one per row of {rows_name}", options)
    return {"row_options": stacked}


def sample_tokens(
    logits: Tensor,
    seed: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    suppress_token: int = -1,
    suppress_tokens: Sequence[int] = (),
    allowed: Tensor | None = None,
    vocab_limit: int | None = None,
) -> Sample:
    """A sample per row from ``softmax(logits / temperature)`` of the tokens that the filters keep.

    Drawn by the Gumbel-max rule (Eq. 3's rollout) in two steps. With x the logits, T the
    temperature, and tile t the ids 64 t to 64 t + 63::

        L_t   = log sum_{v in t} exp(x_v / T)
        t*    = argmax_t L_t - log E(2^31 + t)
        token = argmax_{v in t*} x_v / T - log E(v)

    where E(c) ~ Exp(1) comes from Philox4x32-10 keyed by the seed and counted by (c, row, offset).
    The law is exactly the softmax's, and the same key gives the same sample however the work is
    split, on every backend (which round L_t differently: two tiles whose scores lie within 1e-5 of
    each other may change places). Ties go to the lowest tile, then to the lowest id.

    The filters follow one another in the order of the arguments; each keeps the first tokens in
    descending order of the logits, equal ones by ascending id:

    - ``top_k`` keeps the k largest.
    - ``top_p`` keeps the fewest whose share of what top_k has left is at least top_p.
    - ``min_p`` keeps those with at least min_p times the largest probability.

    Args:
        logits: [..., V], float32, bfloat16 or float16, any strides.
        seed: int64 on the logits' device, so that a replayed graph draws new samples: [2] is
            (seed, offset) and the row's index enters the counter; [..., 2] gives each row its own,
            and its sample does not depend on its place in the batch.
        temperature: 1e-30 to 1e30, or 0 (greedy: token and confidence of
            :func:`dmax_kernels.top1_confidence` at temperature 1, whatever the filters).
        top_k: 0 (off) or a number of tokens; above V it keeps all. Per row, exact up to 2^24.
        top_p: above 0, up to 1 (off).
        min_p: 0 (off) to 1, which keeps the largest and those equal to it.
        suppress_token, suppress_tokens: an id, -1 for none, and further ids that are never sampled.
        allowed: int32 [..., ceil(V / 32)], or one row of that for all: a mask of the tokens that
            may be sampled, in which token v has bit v % 32 of word v // 32, as in xgrammar and
            llguidance. Bits beyond V are ignored.
        vocab_limit: the number of ids that exist, if the logits are padded.

    ``temperature``, ``top_k``, ``top_p`` and ``min_p`` are numbers, or tensors [...] with a value
    per row on the logits' device. (To change them between replays of a CUDA graph, call
    ``torch.ops.dmax.sample_tokens`` with a static ``row_options``, float32 [..., 4], that holds the
    four.)

    Returns:
        token int64 [...], and float32 [...] each: its probability among the tokens kept,
        ``softmax(logits / temperature)[token]``; the ``top1_probability``, the largest of the
        softmax before the filters; and the ``relative_confidence``,
        ``min(top1_probability, exp((logits[token] - max(logits)) / temperature))``. At temperature
        0 all three are the confidence. -inf is never sampled. A row with a NaN or +inf gives its
        first one, a row with nothing allowed or nothing but -inf id 0, and NaN in all three, as in
        :func:`dmax_kernels.top1_confidence`. On a GPU so does a row whose tensor options are out of
        range, with id 0: finding out would mean waiting for the device.

    Raises:
        RuntimeError: wrong dtypes or shapes, a number or (on the CPU) a row's option out of range,
            a token id out of range.
        ValueError: a tensor option of a different shape or device, suppress_tokens or a vocab_limit
            out of range.
    """
    op = "sample_tokens"
    vocab, suppress_token, allowed = visible_tokens(
        op, logits.shape[-1] if logits.dim() else 1, logits.device, suppress_token,
        suppress_tokens, allowed, vocab_limit,
    )  # fmt: skip
    if vocab_limit is not None:
        logits = logits[..., :vocab]
    options = row_options(
        op, "logits", logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p
    )
    return Sample(
        *torch.ops.dmax.sample_tokens(
            logits, seed, **options, suppress_token=suppress_token, allowed=allowed
        )
    )


def empty_sample(rows: Tensor) -> tuple[Tensor, ...]:
    return empty_per_row(rows, torch.int64, torch.float32, torch.float32, torch.float32)


@register_fake("sample_tokens")
def _(logits, seed, **options):
    return empty_sample(logits)


register_not_differentiable("sample_tokens", "detach the logits")


def sample_partial(
    logits_shard: Tensor,
    seed: Tensor,
    vocab_start: int,
    *,
    temperature: float = 1.0,
    suppress_token: int = -1,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What one rank knows of its columns ``vocab_start .. vocab_start + V_shard`` of a sample.

    The shard's part of the draw of :func:`dmax_kernels.sample_tokens` without filters: ``score =
    max_t L_t - log E(2^31 + t)`` over its tiles, and the ``token`` drawn within the best one, where
    t and v count tiles and ids of the whole vocabulary. :func:`dmax_kernels.sample_merge` therefore
    finds the same token however the vocabulary is cut. Beside it ``maximum = max_v x_v``,
    ``sum_exp = sum_v exp((x_v - maximum) / temperature)`` and
    ``weight = exp((x_token - maximum) / temperature)``.

    Args:
        logits_shard: [..., V_shard], float32, bfloat16 or float16. Shards may differ in width.
        seed: as in :func:`dmax_kernels.sample_tokens`, the same on all ranks.
        vocab_start: id of the shard's first token, a multiple of 64 (the ids of a tile are never
            cut apart; only the last shard's width need not be one).
        temperature: 1e-30 to 1e30. (Greedy is :func:`dmax_kernels.top1_partial`.)
        suppress_token: an id of the whole vocabulary, on this shard or not; -1 for none.

    Returns:
        maximum and sum_exp float32 [...], token int64 [...], score and weight float32 [...]. With
        NaN or +inf on the shard the token is its first one and the score NaN or +inf; a shard of
        nothing but -inf has score -inf and no mass.

    Raises:
        RuntimeError: wrong dtypes or shapes, a vocab_start that is negative or no multiple of 64,
            ids beyond 2^31, temperature out of range.
    """
    return torch.ops.dmax.sample_partial(
        logits_shard, seed, vocab_start, temperature=temperature, suppress_token=suppress_token
    )


@register_fake("sample_partial")
def _(logits_shard, seed, vocab_start, *, temperature=1.0, suppress_token=-1):
    f32, i64 = torch.float32, torch.int64
    return empty_per_row(logits_shard, f32, f32, i64, f32, f32)


register_not_differentiable("sample_partial", "detach the logits")


def sample_merge(
    maximum: Tensor,
    sum_exp: Tensor,
    token: Tensor,
    score: Tensor,
    weight: Tensor,
    *,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Merge the results of :func:`dmax_kernels.sample_partial` over S shards.

    The token of the largest score (the lowest id among equals, NaN before all), and with
    ``f_s = exp((maximum_s - max) / temperature)`` its
    ``probability = weight_winner f_winner / sum_s sum_exp_s f_s``.

    Args:
        maximum, sum_exp, token, score, weight: [S, ...] each, S >= 1; token int64, else float32.
        temperature: the one the shards were sampled at.

    Returns:
        token int64 [...], probability float32 [...]: the ids of the unsharded op exactly, the
        probabilities to rounding.

    Raises:
        RuntimeError: wrong dtypes, shapes that differ, a temperature out of range.
    """
    return torch.ops.dmax.sample_merge(
        maximum, sum_exp, token, score, weight, temperature=temperature
    )


@register_fake("sample_merge")
def _(maximum, sum_exp, token, score, weight, *, temperature=1.0):
    shape = maximum.shape[1:]
    return maximum.new_empty(shape, dtype=torch.int64), maximum.new_empty(shape)


register_not_differentiable("sample_merge", "detach the partial results")
