"""The expectation of the embedding under a row's softmax, without stored probabilities."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dmax_kernels.ops._register import empty_per_row, register_fake, register_not_differentiable
from dmax_kernels.ops._temperature import read_temperature


class TopPCut(NamedTuple):
    """What :func:`top_p_cut` returns, both of the logits' shape without V."""

    least: Tensor
    last_id: Tensor


def soft_embedding(
    logits: Tensor, embedding: Tensor, *, temperature: float | Tensor = 1.0, top_p: float = 1.0
) -> Tensor:
    """softmax(logits / temperature) @ embedding, row by row.

    The self-conditioning of DiffusionGemma, and the soft tokens of arXiv 2505.15778: the mean of
    the embeddings under the distribution that a row of logits gives::

        p_v = softmax(x / temperature)_v        h = sum_v p_v e(v)

    With ``top_p`` below 1 the sums of both take the row's most probable tokens alone, those that
    :func:`top_p_cut` keeps.

    float32 inside, rounded once to the embedding's dtype; but with many rows the weights of a
    16-bit embedding may be rounded to its dtype first (docs/semantics.md, "soft_embedding of many
    rows", says where). The probabilities are never in memory as a whole: on a GPU from 33 rows on,
    those of as many tokens at a time as take 128 MB. A token
    with exp((x_v - max x) / temperature) below exp(-30) may be left out: 262,144 of them weigh less
    than 3e-8 in all, and their embeddings must be finite.

    Args:
        logits: [..., V], float32, bfloat16 or float16, any strides.
        embedding: [V, D], float32, bfloat16 or float16.
        temperature: 1e-30 to 1e30; or a float32 tensor of these that broadcasts to logits' shape
            without V. On a GPU, where looking would wait for the device, a row whose temperature
            is out of this range is NaN.
        top_p: above 0, up to 1 (all tokens).

    Returns:
        [..., D] in the embedding's dtype. A row of logits that holds a NaN, a +inf or nothing but
        -inf gives NaN throughout.

    Raises:
        RuntimeError: wrong dtypes, shapes or devices, a temperature or top_p out of range, or a
            backward pass, since the op has no gradient.
    """
    number, temperatures = read_temperature(logits, temperature)
    options: dict[str, Any] = {"temperature": number, "temperatures": temperatures}
    if top_p == 1:
        return torch.ops.dmax.soft_embedding(logits, embedding, **options)
    least, last_id = torch.ops.dmax.top_p_cut(logits, top_p, **options)
    return torch.ops.dmax.soft_embedding(logits, embedding, **options, least=least, last_id=last_id)


def soft_embedding_partial(
    logits_shard: Tensor,
    embedding_shard: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    cut: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What one vocabulary shard contributes to :func:`soft_embedding`.

    :func:`dmax_kernels.distributed.soft_embedding` combines the shards.

    Args:
        logits_shard: [..., V / S], this shard's columns.
        embedding_shard: [V / S, D], its rows of the embedding.
        temperature: as in :func:`soft_embedding`.
        cut: float32 least and int64 last_id [...], as :func:`top_p_cut` gives them for the whole
            vocabulary, except that last_id counts from the shard's first token, to either side.

    Returns:
        float32 maximum [...] of the shard's logits, sum_exp [...] = sum of exp((x - maximum) /
        temperature) and weighted [..., D] = sum of exp((x - maximum) / temperature) e(v), over the
        tokens that the cut keeps. A shard of nothing but -inf, or of which nothing is kept, has
        maximum -inf and zeros. One with a NaN or a +inf has NaN in sum_exp and weighted.

    Raises:
        RuntimeError: as :func:`soft_embedding`.
    """
    number, temperatures = read_temperature(logits_shard, temperature)
    least, last_id = (None, None) if cut is None else cut
    return torch.ops.dmax.soft_embedding_partial(
        logits_shard,
        embedding_shard,
        temperature=number,
        temperatures=temperatures,
        least=least,
        last_id=last_id,
    )


def top_p_cut(logits: Tensor, top_p: float, *, temperature: float | Tensor = 1.0) -> TopPCut:
    """Where the fewest tokens that hold a share ``top_p`` of each row's mass end.

    The tokens are taken in descending order of the logits, equal ones by ascending id, until their
    sum of softmax(logits / temperature) is at least top_p: the filter of that name in
    :func:`dmax_kernels.sample_tokens`. Token v is among them if ``x_v > least``, or if
    ``x_v == least`` and ``v <= last_id``.

    Args:
        logits: [..., V], float32, bfloat16 or float16, any strides.
        top_p: above 0, up to 1, which keeps all.
        temperature: as in :func:`soft_embedding`.

    Returns:
        A named tuple :class:`TopPCut` of least float32 [...], the logit of the last token kept, and
        last_id int64 [...], its id. At top_p 1, and for a row that holds a NaN, a +inf or nothing
        but -inf, they are -inf and V - 1; on a GPU also for a row whose temperature is out of
        range. Backends add the mass up in different orders, and may keep one token more or less
        where the sum comes within rounding of top_p.

    Raises:
        RuntimeError: wrong dtypes, shapes or devices, a temperature or top_p out of range.
    """
    number, temperatures = read_temperature(logits, temperature)
    return TopPCut(
        *torch.ops.dmax.top_p_cut(logits, top_p, temperature=number, temperatures=temperatures)
    )


@register_fake("soft_embedding")
def _(logits, embedding, **options):
    return embedding.new_empty((*logits.shape[:-1], embedding.shape[1]))


@register_fake("soft_embedding_partial")
def _(logits_shard, embedding_shard, **options):
    maximum, sum_exp = empty_per_row(logits_shard, torch.float32, torch.float32)
    shape = (*logits_shard.shape[:-1], embedding_shard.shape[1])
    return maximum, sum_exp, logits_shard.new_empty(shape, dtype=torch.float32)


@register_fake("top_p_cut")
def _(logits, top_p, **options):
    return empty_per_row(logits, torch.float32, torch.int64)


for op in ("soft_embedding", "soft_embedding_partial"):
    register_not_differentiable(op, "detach the logits and the embedding")
register_not_differentiable("top_p_cut", "detach the logits")
