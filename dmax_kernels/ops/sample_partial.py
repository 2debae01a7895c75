"""One vocabulary shard's part of a Gumbel-max sample, for tensor-parallel heads."""

import torch
from torch import Tensor

from dmax_kernels.ops._register import register_fake, register_not_differentiable


def sample_partial(
    logits_shard: Tensor,
    seed: Tensor,
    vocab_start: int,
    *,
    temperature: float = 1.0,
    suppress_token: int = -1,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What one rank knows of its columns ``vocab_start .. vocab_start + V_shard`` of a sample.

    ``score = max_v x_v / temperature - log(E_v)`` at ``token``, with the noise E_v of
    :func:`dmax_kernels.sample_tokens` counted by the id v in the whole vocabulary: the shard's part
    of one race, so :func:`dmax_kernels.sample_merge` finds the same token however the vocabulary is
    cut. Beside it ``maximum = max_v x_v``, ``sum_exp = sum_v exp((x_v - maximum) / temperature)``
    and ``weight = exp((x_token - maximum) / temperature)``.

    Args:
        logits_shard: [..., V_shard], float32, bfloat16 or float16. Shards may differ in width.
        seed: as in :func:`dmax_kernels.sample_tokens`, the same on all ranks.
        vocab_start: id of the shard's first token. Ids that 4 divides are fastest on the GPU, where
            four ids share one call of the generator.
        temperature: 1e-30 to 1e30. (Greedy is :func:`dmax_kernels.top1_partial`.)
        suppress_token: an id of the whole vocabulary, on this shard or not; -1 for none.

    Returns:
        maximum and sum_exp float32 [...], token int64 [...], score and weight float32 [...]. With
        NaN or +inf on the shard the token is its first one and the score NaN or +inf; a shard of
        nothing but -inf has score -inf and no mass.

    Raises:
        RuntimeError: wrong dtypes or shapes, a negative vocab_start, ids beyond 2^31, temperature
            out of range.
    """
    return torch.ops.dmax.sample_partial(
        logits_shard, seed, vocab_start, temperature=temperature, suppress_token=suppress_token
    )


@register_fake("sample_partial")
def _(logits_shard, seed, vocab_start, *, temperature=1.0, suppress_token=-1):
    shape, f32, i64 = logits_shard.shape[:-1], torch.float32, torch.int64
    return tuple(logits_shard.new_empty(shape, dtype=dtype) for dtype in (f32, f32, i64, f32, f32))


register_not_differentiable("sample_partial", "detach the logits")
