"""The whole vocabulary's sample from its shards'."""

import torch
from torch import Tensor

from dmax_kernels.ops._register import register_fake, register_not_differentiable


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
