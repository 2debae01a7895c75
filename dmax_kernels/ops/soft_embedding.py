"""The expectation of the embedding under a row's softmax, without stored probabilities."""

import torch
from torch import Tensor

from dmax_kernels.ops._register import empty_per_row, register_fake, register_not_differentiable


def soft_embedding(
    logits: Tensor, embedding: Tensor, *, temperature: float | Tensor = 1.0
) -> Tensor:
    """softmax(logits / temperature) @ embedding, row by row.

    The self-conditioning of DiffusionGemma, and the soft tokens of arXiv 2505.15778: the mean of
    the embeddings under the distribution that a row of logits gives::

        p_v = softmax(x / temperature)_v        h = sum_v p_v e(v)

    float32 inside, rounded once to the embedding's dtype. No probability is written to memory. A
    token with exp((x_v - max x) / temperature) below exp(-30) may be left out: 262,144 of them
    weigh less than 3e-8 in all, and their embeddings must be finite.

    Args:
        logits: [..., V], float32, bfloat16 or float16, any strides.
        embedding: [V, D], float32, bfloat16 or float16.
        temperature: 1e-30 to 1e30; or a float32 tensor of these that broadcasts to logits' shape
            without V. On a GPU, where looking would wait for the device, a row whose temperature
            is out of this range is NaN.

    Returns:
        [..., D] in the embedding's dtype. A row of logits that holds a NaN, a +inf or nothing but
        -inf gives NaN throughout.

    Raises:
        RuntimeError: wrong dtypes, shapes or devices, a temperature out of range, or a backward
            pass, since the op has no gradient.
    """
    number, temperatures = read_temperature(logits, temperature)
    return torch.ops.dmax.soft_embedding(
        logits, embedding, temperature=number, temperatures=temperatures
    )


def soft_embedding_partial(
    logits_shard: Tensor, embedding_shard: Tensor, *, temperature: float | Tensor = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """What one vocabulary shard contributes to :func:`soft_embedding`.

    :func:`dmax_kernels.distributed.soft_embedding` combines the shards.

    Args:
        logits_shard: [..., V / S], this shard's columns.
        embedding_shard: [V / S, D], its rows of the embedding.
        temperature: as in :func:`soft_embedding`.

    Returns:
        float32 maximum [...] of the shard's logits, sum_exp [...] = sum of exp((x - maximum) /
        temperature) and weighted [..., D] = sum of exp((x - maximum) / temperature) e(v). A shard
        of nothing but -inf has maximum -inf and zeros. One with a NaN or a +inf has NaN in sum_exp
        and weighted.

    Raises:
        RuntimeError: as :func:`soft_embedding`.
    """
    number, temperatures = read_temperature(logits_shard, temperature)
    return torch.ops.dmax.soft_embedding_partial(
        logits_shard, embedding_shard, temperature=number, temperatures=temperatures
    )


def read_temperature(logits: Tensor, temperature: float | Tensor) -> tuple[float, Tensor | None]:
    """(the number, one per row of logits): what the ops take."""
    if not isinstance(temperature, Tensor):
        return temperature, None
    rows = logits.shape[:-1]
    fits = temperature.dim() <= len(rows) and all(
        given in (1, size)
        for given, size in zip(reversed(temperature.shape), reversed(rows), strict=False)
    )
    # What does not fit goes to the op as it is, whose check says so
    return 1.0, temperature.expand(rows) if fits else temperature


@register_fake("soft_embedding")
def _(logits, embedding, *, temperature=1.0, temperatures=None):
    return embedding.new_empty((*logits.shape[:-1], embedding.shape[1]))


@register_fake("soft_embedding_partial")
def _(logits_shard, embedding_shard, *, temperature=1.0, temperatures=None):
    maximum, sum_exp = empty_per_row(logits_shard, torch.float32, torch.float32)
    shape = (*logits_shard.shape[:-1], embedding_shard.shape[1])
    return maximum, sum_exp, logits_shard.new_empty(shape, dtype=torch.float32)


for op in ("soft_embedding", "soft_embedding_partial"):
    register_not_differentiable(op, "detach the logits and the embedding")
