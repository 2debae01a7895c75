"""The most likely tokens of every row and their probabilities, whole or from vocabulary shards."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dmax_kernels.ops._register import empty_per_row, register_fake, register_not_differentiable
from dmax_kernels.vocabulary import visible_rows, visible_shard


def top1_confidence(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    suppress_token: int = -1,
    suppress_tokens: Sequence[int] = (),
    allowed: Tensor | None = None,
    vocab_limit: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Top-1 prediction and confidence of every position (Algorithm 1, line 4).

    ``token = argmax_v logits[v]``, ``confidence = softmax(logits / temperature)[token]``.

    Args:
        logits: [..., V], float32, bfloat16 or float16, any strides.
        temperature: 1e-30 to 1e30. It scales the confidence; the token is the arg-max of the
            logits themselves.
        suppress_token, suppress_tokens: an id, -1 for none, and further ids that get neither chosen
            nor any probability (say, the mask token).
        allowed: int32 [..., ceil(V / 32)], or one row of that for all: a mask of the tokens that
            count, in which token v has bit v % 32 of word v // 32, as in xgrammar and llguidance.
            Bits beyond V are ignored. A token that it leaves out counts as if its logit were -inf;
            where whole runs of tokens are left out, their logits are not read.
        vocab_limit: the number of ids that exist, if the logits are padded.

    Returns:
        token int64 [...] and confidence float32 [...]. Ties go to the lowest id. A NaN in the row:
        the first NaN's id, confidence NaN. A +inf: the first one's id, NaN. Nothing but -inf, or
        nothing allowed: id 0, NaN. The confidence is within 2e-6 of float64's, relatively, and the
        same row gives the same bits however many rows there are.

    Raises:
        RuntimeError: logits of a different dtype or 0-D, a temperature or token id out of range, a
            mask of a different dtype or shape.
        ValueError: suppress_tokens or a vocab_limit out of range.
    """
    logits, suppress_token, allowed = visible_rows(
        "top1_confidence", logits, suppress_token, suppress_tokens, allowed, vocab_limit
    )
    return torch.ops.dmax.top1_confidence(
        logits, temperature=temperature, suppress_token=suppress_token, allowed=allowed
    )


@register_fake("top1_confidence")
def _(logits, *, temperature=1.0, suppress_token=-1, allowed=None):
    return empty_per_row(logits, torch.int64, torch.float32)


register_not_differentiable("top1_confidence", "detach the logits")


def topk_confidence(
    logits: Tensor,
    k: int,
    *,
    temperature: float = 1.0,
    suppress_token: int = -1,
    suppress_tokens: Sequence[int] = (),
    allowed: Tensor | None = None,
    vocab_limit: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The k largest of ``softmax(logits / temperature)``, for top-k hybrid embeddings.

    Args:
        logits: [..., V], float32, bfloat16 or float16, any strides.
        k: 1..8, at most V.
        temperature, suppress_token, suppress_tokens, allowed, vocab_limit: as in
            :func:`dmax_kernels.top1_confidence`; a token that does not count ranks with the -inf.

    Returns:
        tokens int64 [..., k] and confidences float32 [..., k], descending; equal logits by
        ascending id, NaN before all. Where the row has a NaN, a +inf, or nothing but -inf, all of
        its confidences are NaN.

    Raises:
        RuntimeError: wrong dtype or shape, k, temperature or token id out of range.
        ValueError: suppress_tokens or a vocab_limit out of range.
    """
    logits, suppress_token, allowed = visible_rows(
        "topk_confidence", logits, suppress_token, suppress_tokens, allowed, vocab_limit
    )
    return torch.ops.dmax.topk_confidence(
        logits, k, temperature=temperature, suppress_token=suppress_token, allowed=allowed
    )


@register_fake("topk_confidence")
def _(logits, k, *, temperature=1.0, suppress_token=-1, allowed=None):
    shape = (*logits.shape[:-1], k)
    return logits.new_empty(shape, dtype=torch.int64), logits.new_empty(shape, dtype=torch.float32)


register_not_differentiable("topk_confidence", "detach the logits")


def top1_partial(
    logits_shard: Tensor,
    vocab_start: int,
    *,
    temperature: float = 1.0,
    suppress_token: int = -1,
    suppress_tokens: Sequence[int] = (),
    allowed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What one rank knows of its columns ``vocab_start .. vocab_start + V_shard`` of the logits.

    ``maximum = max_v x_v``, ``sum_exp = sum_v exp((x_v - maximum) / temperature)``,
    ``token = vocab_start + argmax_v x_v``. Gather the three from all ranks, stack them along a new
    first dimension, and :func:`dmax_kernels.top1_merge` at the same temperature gives the whole
    vocabulary's top-1. The maximum is not divided: two shards' maxima could round to one quotient,
    and the wrong shard would win the tie.

    Args:
        logits_shard: [..., V_shard], float32, bfloat16 or float16. Shards may differ in width.
        vocab_start: id of the shard's first token.
        suppress_token, suppress_tokens: ids of the whole vocabulary, on this shard or not; -1 for
            no suppress_token.
        allowed: int32 [..., ceil(V_shard / 32)], or one row of that for all: as in
            :func:`dmax_kernels.top1_confidence`, of the shard's tokens, whose first has bit 0 of
            word 0. (A vocab_limit needs no option here: pass a narrower shard.)

    Returns:
        maximum float32 [...], sum_exp float32 [...], token int64 [...] (ids travel as integers:
        float32 is exact only up to 2^24). A shard of nothing but -inf, or with nothing allowed, has
        maximum -inf and sum 0.

    Raises:
        RuntimeError: wrong dtype or shape, a negative vocab_start, temperature out of range.
        ValueError: a negative id in suppress_tokens.
    """
    suppress_token, allowed = visible_shard(
        "top1_partial", logits_shard, vocab_start, suppress_token, suppress_tokens, allowed
    )
    return torch.ops.dmax.top1_partial(
        logits_shard, vocab_start, temperature=temperature, suppress_token=suppress_token,
        allowed=allowed,
    )  # fmt: skip


@register_fake("top1_partial")
def _(logits_shard, vocab_start, *, temperature=1.0, suppress_token=-1, allowed=None):
    return empty_per_row(logits_shard, torch.float32, torch.float32, torch.int64)


register_not_differentiable("top1_partial", "detach the logits")


def top1_merge(
    maximum: Tensor, sum_exp: Tensor, token: Tensor, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Merge the results of :func:`dmax_kernels.top1_partial` over S shards.

    The token of the largest maximum (the lowest id among equals, NaN before all), and
    ``confidence = 1 / sum_s sum_exp_s exp((maximum_s - max) / temperature)``.

    Args:
        maximum: float32 [S, ...], S >= 1.
        sum_exp: float32 [S, ...].
        token: int64 [S, ...].
        temperature: the one the shards' sums were taken at.

    Returns:
        token int64 [...], confidence float32 [...]: the ids of the unsharded op exactly, the
        confidences to rounding.

    Raises:
        RuntimeError: wrong dtypes, shapes that differ, a temperature out of range.
    """
    return torch.ops.dmax.top1_merge(maximum, sum_exp, token, temperature=temperature)


@register_fake("top1_merge")
def _(maximum, sum_exp, token, *, temperature=1.0):
    shape = maximum.shape[1:]
    return maximum.new_empty(shape, dtype=torch.int64), maximum.new_empty(shape)


register_not_differentiable("top1_merge", "detach the partial results")
