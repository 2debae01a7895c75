"""Which masked positions become token positions."""

import torch
from torch import Tensor

from dmax_kernels.ops._register import register_fake, register_not_differentiable


def prefix_promote(
    confidence: Tensor, masked: Tensor, threshold: float, *, inclusive: bool = False
) -> Tensor:
    """The confident prefix of the masked positions (Algorithm 1, lines 5-8).

    Among the positions with ``masked``, left to right, the longest run with
    ``confidence > threshold`` (``>=`` if ``inclusive``); if that is empty, its first position, so
    that decoding always advances. Positions that are not masked are skipped: they do not end it.

    Args:
        confidence: float32 [..., K]; a NaN passes no threshold.
        masked: bool [..., K].
        threshold: tau_dec.

    Returns:
        promoted bool [..., K], a subset of ``masked``.

    Raises:
        RuntimeError: wrong dtypes, shapes that differ, a threshold that is NaN.
    """
    return torch.ops.dmax.prefix_promote(confidence, masked, threshold, inclusive=inclusive)


@register_fake("prefix_promote")
def _(confidence, masked, threshold, *, inclusive=False):
    return confidence.new_empty(confidence.shape, dtype=torch.bool)


register_not_differentiable("prefix_promote", "detach the confidence")
