"""Sampled tokens and their probabilities."""

import torch
from torch import Tensor

from dmax_kernels.ops._register import register_fake, register_not_differentiable


def sample_tokens(
    logits: Tensor, seed: Tensor, *, temperature: float = 1.0, suppress_token: int = -1
) -> tuple[Tensor, Tensor]:
    """A sample from ``softmax(logits / temperature)`` by the Gumbel-max rule (Eq. 3's rollout).

    ``token = argmax_v logits[v] / temperature - log(E_v)`` with E_v ~ Exp(1) from Philox4x32-10
    keyed by the seed and counted by (v, row, offset): the same key always gives the same sample,
    on every backend and however the work is split.

    Args:
        logits: [..., V], float32, bfloat16 or float16, any strides.
        seed: int64 on the logits' device, so that a replayed CUDA graph draws anew: [2] is
            (seed, offset) and the row's index enters the counter; [..., 2] gives each row its own,
            and its sample does not depend on its place in the batch.
        temperature: 0 (greedy: exactly :func:`dmax_kernels.top1_confidence`) or 1e-30 to 1e30.
        suppress_token: an id that is never sampled; -1 for none.

    Returns:
        token int64 [...] and its probability ``softmax(logits / temperature)[token]``, float32
        [...]. -inf is never sampled; NaN, +inf and all -inf as in
        :func:`dmax_kernels.top1_confidence`.

    Raises:
        RuntimeError: wrong dtypes or shapes, a temperature or token id out of range.
    """
    return torch.ops.dmax.sample_tokens(
        logits, seed, temperature=temperature, suppress_token=suppress_token
    )


@register_fake("sample_tokens")
def _(logits, seed, *, temperature=1.0, suppress_token=-1):
    shape = logits.shape[:-1]
    return logits.new_empty(shape, dtype=torch.int64), logits.new_empty(shape, dtype=torch.float32)


register_not_differentiable("sample_tokens", "detach the logits")
