"""The expectation of a row-sharded embedding under a column-sharded softmax."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from dmax_kernels import ops
from dmax_kernels.distributed.collectives import gather, gather_logits, sum_over_ranks
from dmax_kernels.distributed.layout import at_least_one_column, read_shard, visible


def soft_embedding(
    logits: Tensor,
    embedding: Tensor,
    *,
    group: ProcessGroup | None = None,
    shard_sizes: Sequence[int] | None = None,
    vocab_size: int | None = None,
    temperature: float | Tensor = 1.0,
    top_p: float = 1.0,
) -> Tensor:
    """:func:`dmax_kernels.soft_embedding` with the vocabulary of both arguments sharded.

    Each rank's :func:`dmax_kernels.soft_embedding_partial`, one all-gather of 4 bytes per row (the
    maxima) and one all-reduce of D + 1 float32 per row (the sums relative to the largest). With
    top_p below 1 the ranks also gather the logits, since where the cut lies depends on all of them.

    Args:
        logits: this rank's columns [..., V_shard], or a DTensor sharded on its last dimension.
        embedding: this rank's rows [V_shard, D], or a DTensor sharded on dimension 0.
        group, shard_sizes, vocab_size: see :mod:`dmax_kernels.distributed`.
        temperature, top_p: as in the unsharded op, the same on every rank.

    Returns:
        [..., D] in the embedding's dtype, the same on every rank, equal to the unsharded op's to a
        few float32 roundings, or to those of the weights where they are rounded to 16 bits.

    Raises:
        ValueError: shards that do not fit together. RuntimeError: as the unsharded op.
    """
    op = "soft_embedding"
    logits, shard = read_shard(op, "logits", logits, -1, group, shard_sizes, vocab_size)
    table, of_table = read_shard(op, "embedding", embedding, 0, group, shard_sizes, vocab_size)
    if of_table.sizes != shard.sizes:
        raise ValueError(
            f"{op}: embedding must have the logits' shards, {list(shard.sizes)} ids wide, "
            f"got {list(of_table.sizes)}"
        )
    mine, rows = visible(logits, shard, -1), visible(table, shard, 0)
    if shard.num_ranks == 1:
        return ops.soft_embedding(mine, rows, temperature=temperature, top_p=top_p)
    cut = None
    if top_p != 1:
        least, last_id = ops.top_p_cut(
            gather_logits(op, shard, logits), top_p, temperature=temperature
        )
        cut = (least, last_id - shard.start)
    if shard.width == 0:
        rows = rows.new_zeros(1, *rows.shape[1:])
    maximum, sum_exp, weighted = ops.soft_embedding_partial(
        at_least_one_column(mine), rows, temperature=temperature, cut=cut
    )
    (maxima,) = gather(op, shard, table.dtype, (maximum,))
    # A shard of nothing but -inf has no part; a NaN or a +inf has made its sums NaN
    share = ((maximum - maxima.amax(dim=0)) / temperature).exp()
    share = share.masked_fill(maximum == -torch.inf, 0).unsqueeze(-1)
    sums = torch.cat([weighted, sum_exp.unsqueeze(-1)], dim=-1) * share
    sums = sum_over_ranks(shard, sums)
    return (sums[..., :-1] / sums[..., -1:]).to(table.dtype)
