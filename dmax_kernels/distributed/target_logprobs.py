"""Log-probabilities of given tokens, entropies and arg-maxes over a sharded vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from dmax_kernels import ops
from dmax_kernels.distributed.collectives import gather, sum_over_ranks
from dmax_kernels.distributed.layout import VocabShard, read_shard, visible
from dmax_kernels.distributed.linear import ShardedHead, read_head
from dmax_kernels.ops._logprob_blocks import (
    Rows,
    block_rows,
    finish,
    grad_of_logits,
    gradients_of_head,
    kept_rows,
    merge_rows,
    no_rows,
    rows_of_head,
)
from dmax_kernels.ops._register import once_differentiable
from dmax_kernels.ops.target_logprobs import TargetLogprobs, check_target
from dmax_kernels.reduction import autocast_operands


def target_logprobs(
    logits: Tensor,
    target: Tensor,
    *,
    group: ProcessGroup | None = None,
    shard_sizes: Sequence[int] | None = None,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
) -> TargetLogprobs:
    """:func:`dmax_kernels.target_logprobs` of the whole vocabulary.

    One all-gather of 40 bytes per row: each shard's largest logit and its id, the logarithm of its
    share of the softmax's denominator, its entropy, and the target's logit, merged in float64. The
    backward pass has no collective. The results are replicated, and their gradients must be too:
    call ``backward`` on every rank.

    Args:
        logits: this rank's columns [..., V_shard], or a DTensor sharded on the last dimension.
        target: int64 or int32 [...], ids of the whole vocabulary, the same on every rank.
        group, shard_sizes, vocab_size: see :mod:`dmax_kernels.distributed`.
        temperature, ignore_index: as in the unsharded op.

    Returns:
        As the unsharded op, the same on every rank.

    Raises:
        ValueError: shards that do not fit together, and as the unsharded op.
    """
    op = "target_logprobs"
    mine, shard = read_shard(op, "logits", logits, -1, group, shard_sizes, vocab_size)
    mine = visible(mine, shard, -1)
    if shard.num_ranks == 1:
        return ops.target_logprobs(mine, target, temperature=temperature, ignore_index=ignore_index)
    check_target(op, "logits", mine, target, temperature, ignore_index, shard.vocab_size)
    results = _FromShard.apply(mine, target, shard, op, float(temperature), ignore_index)
    return TargetLogprobs(*results)


def linear_target_logprobs(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    group: ProcessGroup | None = None,
    shard_sizes: Sequence[int] | None = None,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
) -> TargetLogprobs:
    """:func:`dmax_kernels.linear_target_logprobs` with the LM head's rows sharded.

    Under autocast, hidden, weight and bias are cast as in the unsharded op. The forward pass takes
    the all-gather of :func:`target_logprobs`. The backward pass takes one all-reduce, that of the
    hidden states' gradient in float32: these are replicated, and every rank returns their whole
    gradient. About 64 MB of logits exist at a time; the backward pass computes them again.

    Args:
        hidden: [..., D], the same on every rank.
        weight: this rank's rows [V_shard, D], or a DTensor sharded on dimension 0.
        bias: this rank's [V_shard], or None.
        target, group, shard_sizes, vocab_size: as in :func:`target_logprobs`.
        temperature, ignore_index: as in the unsharded op.

    Returns:
        As the unsharded op, the same on every rank; differentiable once in hidden, weight and bias.
        The same tensors must require a gradient on every rank.

    Raises:
        ValueError: as :func:`target_logprobs`.
    """
    op = "linear_target_logprobs"
    hidden, weight, bias = autocast_operands(hidden, weight, bias)
    head = read_head(op, hidden, weight, bias, group, shard_sizes, vocab_size)
    options = {"temperature": temperature, "ignore_index": ignore_index}
    if head.shard.num_ranks == 1:
        return ops.linear_target_logprobs(hidden, head.weight, target, bias=head.bias, **options)
    vocab = head.shard.vocab_size
    check_target(op, "hidden", hidden, target, temperature, ignore_index, vocab)
    results = _FromShardedHead.apply(
        hidden, head.weight, head.bias, target, head.shard, op, float(temperature), ignore_index
    )
    return TargetLogprobs(*results)


def _over_ranks(
    op: str, shard: VocabShard, dtype: torch.dtype, mine: Rows, temperature: float
) -> Rows:
    """The statistics of the whole vocabulary from those of this rank's columns."""
    fields = torch.stack([each.double() for each in mine])  # ids are exact up to 2^53
    (gathered,) = gather(op, shard, dtype, (fields,))

    def of_rank(fields: Tensor) -> Rows:
        return Rows(*(f.to(like.dtype) for f, like in zip(fields, mine, strict=True)))

    rows = of_rank(gathered[0])
    for later in gathered[1:]:
        rows = merge_rows(rows, of_rank(later), temperature)
    return rows


class _FromShard(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target, shard, op, temperature, ignore_index):
        ids = target.reshape(-1).long()
        flat = logits.reshape(len(ids), shard.width)
        rows = no_rows(ids)
        if flat.numel():
            rows = block_rows(flat, ids, shard.start, temperature)
        rows = _over_ranks(op, shard, logits.dtype, rows, temperature)
        ctx.start = shard.start
        return finish(ctx, (logits,), rows, ids, target, temperature, ignore_index)

    @staticmethod
    @once_differentiable("target_logprobs")
    def backward(ctx, grad_logprob, grad_entropy, *_):
        logits, ids, *rows = ctx.saved_tensors
        flat, upstream = logits.reshape(len(ids), logits.shape[-1]), (grad_logprob, grad_entropy)
        grad = grad_of_logits(flat, Rows(*rows), ids, *upstream, ctx.start, *ctx.options)
        return grad.view(logits.shape), None, None, None, None, None


class _FromShardedHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, target, shard, op, temperature, ignore_index):
        ids = target.reshape(-1).long()
        flat = kept_rows(hidden, ids, ignore_index)
        head = ShardedHead(weight, bias, shard)
        rows = rows_of_head(head.logit_blocks(flat), ids, shard.start, temperature)
        rows = _over_ranks(op, shard, hidden.dtype, rows, temperature)
        ctx.shard, ctx.shape = shard, hidden.shape
        return finish(ctx, (flat, weight, bias), rows, ids, target, temperature, ignore_index)

    @staticmethod
    @once_differentiable("linear_target_logprobs")
    def backward(ctx, grad_logprob, grad_entropy, *_):
        flat, weight, bias, ids, *rows = ctx.saved_tensors
        head = ShardedHead(weight, bias, ctx.shard)
        grad_hidden, *grads = gradients_of_head(
            head.logit_blocks(flat), flat, weight, bias, Rows(*rows), ids, grad_logprob,
            grad_entropy, ctx.shard.start, ctx.options, ctx.needs_input_grad[:3],
        )  # fmt: skip
        if grad_hidden is not None:
            grad_hidden = sum_over_ranks(ctx.shard, grad_hidden).to(flat.dtype).view(ctx.shape)
        return grad_hidden, *grads, None, None, None, None, None
