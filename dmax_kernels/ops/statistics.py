"""Top-1, runner-up, entropy and normaliser of every row, in one read of the logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dmax_kernels.ops._register import empty_per_row, register_fake, register_not_differentiable
from dmax_kernels.vocabulary import visible_rows


class RowStatistics(NamedTuple):
    """What :func:`row_statistics` returns, all of the logits' shape without V."""

    token: Tensor
    confidence: Tensor
    runner_up: Tensor
    entropy: Tensor
    logsumexp: Tensor


def row_statistics(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    suppress_token: int = -1,
    suppress_tokens: Sequence[int] = (),
    allowed: Tensor | None = None,
    vocab_limit: int | None = None,
) -> RowStatistics:
    """What decoding rules other than top-1 confidence ask of a position's distribution.

    With ``x = logits / temperature`` and ``p = softmax(x)``::

        token      = argmax_v x_v             confidence = p[token]
        runner_up  = max_{v != token} p_v     (confidence - runner_up is the margin)
        entropy    = -sum_v p_v log p_v       in nats, with 0 log 0 = 0
        logsumexp  = log sum_v exp(x_v)       (log p_v = x_v - logsumexp)

    Args:
        logits: [..., V], float32, bfloat16 or float16, any strides.
        temperature: 1e-30 to 1e30.
        suppress_token, suppress_tokens, allowed, vocab_limit: which tokens count, as in
            :func:`dmax_kernels.top1_confidence`; the others do as if their logits were -inf.

    Returns:
        A named tuple :class:`RowStatistics` of token int64 [...] and confidence, runner_up, entropy
        and logsumexp float32 [...]. Token and confidence are those of
        :func:`dmax_kernels.top1_confidence`, to the last bit. The runner-up equals the confidence
        on a tie, and is 0 where no other token has any mass. The entropy is never negative; it is
        within 1e-6 + 2e-6 relative of float64's, and where the row is sure within 2e-6 relative
        (down to an entropy of 1e-8). A NaN in the row: its first id, all else NaN. A +inf: its
        first id, logsumexp +inf, all else NaN. Nothing but -inf, or nothing allowed: id 0,
        logsumexp -inf, all else NaN.

    Raises:
        RuntimeError: logits of a different dtype or 0-D, a temperature or token id out of range, a
            mask of a different dtype or shape.
        ValueError: suppress_tokens or a vocab_limit out of range.
    """
    logits, suppress_token, allowed = visible_rows(
        "row_statistics", logits, suppress_token, suppress_tokens, allowed, vocab_limit
    )
    return RowStatistics(
        *torch.ops.dmax.row_statistics(
            logits, temperature=temperature, suppress_token=suppress_token, allowed=allowed
        )
    )


@register_fake("row_statistics")
def _(logits, *, temperature=1.0, suppress_token=-1, allowed=None):
    return empty_per_row(logits, torch.int64, *(torch.float32,) * 4)


register_not_differentiable("row_statistics", "detach the logits")
