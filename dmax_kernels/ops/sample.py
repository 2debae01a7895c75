"""Sampled tokens and their probabilities, whole or from vocabulary shards."""

import torch
from torch import Tensor

from dmax_kernels.ops._register import empty_per_row, register_fake, register_not_differentiable


def sample_tokens(
    logits: Tensor, seed: Tensor, *, temperature: float = 1.0, suppress_token: int = -1
) -> tuple[Tensor, Tensor]:
    """A sample from ``softmax(logits / temperature)`` by the Gumbel-max rule (Eq. 3's rollout).

    ``token = argmax_v logits[v] / temperature - log(E_v)`` with E_v ~ Exp(1) from Philox4x32-10
    keyed by the seed and counted by (v, row, offset): the same key always gives the same sample,
    on every backend and however the work is split.

    Args:
        logits: [..., V], float32, bfloat16 or float16, any strides.
        seed: int64 on the logits' device, so that a replayed graph draws new samples: [2] is
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
    return empty_per_row(logits, torch.int64, torch.float32)


register_not_differentiable("sample_tokens", "detach the logits")


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
        vocab_start: id of the shard's first token. Multiples of 4 are fastest on the GPU, where
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
    f32, i64 = torch.float32, torch.int64
    return empty_per_row(logits_shard, f32, f32, i64, f32, f32)


register_not_differentiable("sample_partial", "detach the logits")


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
