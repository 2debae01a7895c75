"""One vocabulary shard's part of the top-1, for tensor-parallel heads."""

import torch
from torch import Tensor

from dmax_kernels.ops._register import register_fake, register_not_differentiable


def top1_partial(
    logits_shard: Tensor, vocab_start: int, *, temperature: float = 1.0, suppress_token: int = -1
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
        suppress_token: an id of the whole vocabulary, on this shard or not; -1 for none.

    Returns:
        maximum float32 [...], sum_exp float32 [...], token int64 [...] (ids travel as integers:
        float32 is exact only up to 2^24). A shard of nothing but -inf has maximum -inf and sum 0.

    Raises:
        RuntimeError: wrong dtype or shape, a negative vocab_start, temperature out of range.
    """
    return torch.ops.dmax.top1_partial(
        logits_shard, vocab_start, temperature=temperature, suppress_token=suppress_token
    )


@register_fake("top1_partial")
def _(logits_shard, vocab_start, *, temperature=1.0, suppress_token=-1):
    shape = logits_shard.shape[:-1]
    dtypes = (torch.float32, torch.float32, torch.int64)
    return tuple(logits_shard.new_empty(shape, dtype=dtype) for dtype in dtypes)


register_not_differentiable("top1_partial", "detach the logits")
