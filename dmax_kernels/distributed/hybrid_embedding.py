"""The soft state between mask and token, from a row-sharded embedding table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from dmax_kernels import ops
from dmax_kernels.distributed.collectives import sum_of_disjoint
from dmax_kernels.distributed.layout import VocabShard, read_shard, visible
from dmax_kernels.ops._register import once_differentiable


def hybrid_embedding(
    embedding: Tensor,
    token: Tensor,
    confidence: Tensor,
    masked: Tensor,
    mask_token_id: int,
    *,
    group: ProcessGroup | None = None,
    shard_sizes: Sequence[int] | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """:func:`dmax_kernels.hybrid_embedding` with the rows of the table sharded (Eqs. 8-10).

    One all-reduce brings the rows that the positions need, e(mask) among them, in the table's
    dtype. Each row comes from the one rank that holds it, and nothing is rounded. The op then runs
    on these rows on every rank: output and gradients have the bits of the unsharded op. (Reducing
    the mixes instead would send float32, round, and need the norms before they are known.)

    The backward pass has no collective. The output is replicated, and its gradient must be too,
    which it is if every rank computes the same from the output. A rank keeps its rows' gradient.

    Args:
        embedding: this rank's rows [V_shard, D], or a DTensor sharded on dimension 0.
        token, confidence, masked, mask_token_id: as in the unsharded op, the same on every rank.
        group, shard_sizes, vocab_size: see :mod:`dmax_kernels.distributed`.

    Returns:
        [..., D] in the embedding's dtype, the same on every rank; differentiable in ``embedding``
        and ``confidence``.

    Raises:
        ValueError: shards that do not fit together, an id outside the vocabulary (a token on the
            GPU: that position is NaN). RuntimeError: as the unsharded op.
    """
    op = "hybrid_embedding"
    embedding, shard = read_shard(op, "embedding", embedding, 0, group, shard_sizes, vocab_size)
    if embedding.dim() != 2:
        raise ValueError(f"{op}: embedding must be [V_shard, D], got {list(embedding.shape)}")
    if not 0 <= mask_token_id < shard.vocab_size:
        raise ValueError(
            f"{op}: mask_token_id must be a token id in [0, {shard.vocab_size}), "
            f"got {mask_token_id}"
        )
    if shard.num_ranks == 1:
        mine = visible(embedding, shard, 0)
        return ops.hybrid_embedding(mine, token, confidence, masked, mask_token_id)
    _check_tokens(token, masked, shard.vocab_size)
    return _ShardedHybrid.apply(embedding, token, confidence, masked, mask_token_id, shard)


def _check_tokens(token: Tensor, masked: Tensor, vocab_size: int) -> None:
    if token.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"hybrid_embedding: token must be int64 or int32, got {token.dtype}")
    if token.device.type != "cpu" or token.shape[: masked.dim()] != masked.shape:
        return  # the op checks the shapes
    outside = (token < 0) | (token >= vocab_size)
    if token.dim() > masked.dim():
        outside = outside.any(dim=-1)
    outside = (outside & ~masked).flatten()
    if outside.any():
        raise ValueError(
            f"hybrid_embedding: token must be in [0, {vocab_size}) where masked is False, "
            f"got an id outside at position {int(outside.nonzero()[0])}"
        )


class _NeededRows(NamedTuple):
    """A batch's distinct ids: row i of a small table holds the row of id ``ids[i]``.

    The ids are sorted, with the mask first and repetitions kept: no size depends on the data, and
    nothing waits for the GPU.
    """

    ids: Tensor  # int64 [N k + 1]
    first: Tensor  # bool: not a repetition
    place: Tensor  # int64, token's shape: its row of the table; the mask's is 0

    @classmethod
    def of(cls, token: Tensor, mask_token_id: int) -> _NeededRows:
        flat = token.reshape(-1).long()
        key = torch.where(flat == mask_token_id, -1, flat)
        ids = torch.cat([key.new_full((1,), -1), key]).sort().values
        place = torch.searchsorted(ids, key).view(token.shape)
        first = torch.ones_like(ids, dtype=torch.bool)
        first[1:] = ids[1:] != ids[:-1]
        # An id below 0 would sort before the mask. It gets the mask's place; its result is NaN
        return cls(torch.where(ids == -1, mask_token_id, ids), first, place)


class _ShardedHybrid(torch.autograd.Function):
    @staticmethod
    def forward(ctx, embedding, token, confidence, masked, mask_token_id, shard: VocabShard):
        outside = (token < 0) | (token >= shard.vocab_size)
        needed = _NeededRows.of(torch.where(outside, mask_token_id, token), mask_token_id)
        local = needed.ids - shard.start
        mine = (local >= 0) & (local < shard.width)
        if shard.width > 0:
            rows = embedding[torch.where(mine, local, 0)]
            rows = torch.where(mine.unsqueeze(1), rows, 0)
        else:
            rows = embedding.new_zeros(len(local), embedding.shape[1])
        table = sum_of_disjoint("hybrid_embedding", shard, rows)
        if confidence.shape == outside.shape:
            confidence = torch.where(outside, torch.nan, confidence)
        ctx.shard_size = embedding.shape[0]
        ctx.save_for_backward(table, needed.place, confidence, masked, local, mine & needed.first)
        return ops.hybrid_embedding(table, needed.place, confidence, masked, 0)

    @staticmethod
    @once_differentiable("hybrid_embedding")
    def backward(ctx, grad_output):
        table, place, confidence, masked, local, mine = ctx.saved_tensors
        grad_table, grad_confidence = torch.ops.dmax.hybrid_embedding_backward(
            grad_output, table, place, confidence, masked, 0
        )
        # The last row, cut off below, takes repetitions and what belongs to other ranks
        grad_embedding = table.new_zeros(ctx.shard_size + 1, table.shape[1])
        grad_embedding[torch.where(mine, local, ctx.shard_size)] = grad_table
        return grad_embedding[:-1], None, grad_confidence, None, None, None
