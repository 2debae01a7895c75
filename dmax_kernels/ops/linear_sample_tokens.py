"""Sampled tokens from the hidden state: the on-policy rollout without stored logits."""

import torch
from torch import Tensor

from dmax_kernels.ops._register import register_fake, register_not_differentiable


def linear_sample_tokens(
    hidden: Tensor,
    weight: Tensor,
    seed: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float = 1.0,
    suppress_token: int = -1,
) -> tuple[Tensor, Tensor]:
    """:func:`dmax_kernels.sample_tokens` of ``hidden @ weight.T + bias`` (Eq. 3's rollout).

    The noise is keyed by (seed, offset, row, id) as there, so that a sample depends neither on how
    the product is tiled nor, with a seed per row, on which other rows are asked for: pass
    ``hidden[masked]`` to draw for the masked positions alone. Logits are float32, as in
    :func:`dmax_kernels.linear_top1_confidence`.

    Args:
        hidden: [..., D], float32, bfloat16 or float16.
        weight: [V, D], the LM head, in hidden's dtype.
        seed: int64 on hidden's device, [2] or [..., 2], as in :func:`dmax_kernels.sample_tokens`.
        bias: [V] in hidden's dtype, or None.
        temperature: 0 (greedy: exactly :func:`dmax_kernels.linear_top1_confidence`) or 1e-30 to
            1e30.
        suppress_token: an id that is never sampled; -1 for none.

    Returns:
        token int64 [...] and its probability float32 [...].

    Raises:
        RuntimeError: dtypes or shapes that do not fit, a temperature or token id out of range.
    """
    return torch.ops.dmax.linear_sample_tokens(
        hidden, weight, seed, bias, temperature=temperature, suppress_token=suppress_token
    )


@register_fake("linear_sample_tokens")
def _(hidden, weight, seed, bias=None, *, temperature=1.0, suppress_token=-1):
    shape = hidden.shape[:-1]
    return hidden.new_empty(shape, dtype=torch.int64), hidden.new_empty(shape, dtype=torch.float32)


register_not_differentiable("linear_sample_tokens", "detach the hidden states and the weight")
