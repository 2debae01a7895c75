"""The whole vocabulary's top-1 from its shards'."""

import torch
from torch import Tensor

from dmax_kernels.ops._register import register_fake, register_not_differentiable


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
