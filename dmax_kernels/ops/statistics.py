"""Top-1, runner-up, entropy and normaliser of every row, in one read of the logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dmax_kernels.ops._register import empty_per_row, register_fake, register_not_differentiable
from dmax_kernels.ops._temperature import read_temperature
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
    temperature: float | Tensor = 1.0,
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
        temperature: 1e-30 to 1e30; or a float32 tensor of these that broadcasts to logits' shape
            without V. A row then has the bits that its own temperature as a number gives it. On a
            GPU, where looking would wait for the device, a row whose temperature is out of this
            range has token 0 and NaN in all else.
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
            mask or a tensor of temperatures of a different dtype, shape or device.
        ValueError: suppress_tokens or a vocab_limit out of range.
    """
    logits, suppress_token, allowed = visible_rows(
        "row_statistics", logits, suppress_token, suppress_tokens, allowed, vocab_limit
    )
    number, temperatures = read_temperature(logits, temperature)
    return RowStatistics(
        *torch.ops.dmax.row_statistics(
            logits,
            temperature=number,
            temperatures=temperatures,
            suppress_token=suppress_token,
            allowed=allowed,
        )
    )


@register_fake("row_statistics")
def _(logits, **options):
    return empty_per_row(logits, torch.int64, *(torch.float32,) * 4)


register_not_differentiable("row_statistics", "detach the logits")
