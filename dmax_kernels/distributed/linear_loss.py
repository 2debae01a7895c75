"""linear_oput_loss over a sharded vocabulary: single losses, or their sum with its gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from dmax_kernels.distributed.collectives import gather, sum_over_ranks
from dmax_kernels.distributed.layout import VocabShard
from dmax_kernels.distributed.linear import ShardedHead, float32_product
from dmax_kernels.distributed.loss_parts import LossParts, Targets
from dmax_kernels.ops._register import once_differentiable

# Logits that a sum keeps between the loss and the gradient
KEPT_BYTES = 1 << 30


def losses(
    head: ShardedHead, hidden: Tensor, targets: Targets, parts: LossParts, kept_bytes: int
) -> tuple[tuple[Tensor, Tensor, Tensor], list[Tensor]]:
    """((loss, logsumexp, cross-entropy) of each row, the logits of the first blocks)."""
    fields, kept = [], []
    for block in head.blocks(len(hidden)):
        logits = head.logits(hidden, block)
        fields.append(parts.fields(logits, targets.ids, block.begin))
        kept_bytes -= logits.nbytes
        if kept_bytes >= 0:
            kept.append(logits)
    (gathered,) = gather(parts.op, head.shard, hidden.dtype, (torch.stack(fields),))
    return parts.merge(gathered.flatten(0, 1), targets), kept


def gradients(
    head: ShardedHead, hidden: Tensor, targets: Targets, parts: LossParts, grad_loss: Tensor,
    logsumexp: Tensor, nll: Tensor, kept: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Of the hidden states (over all ranks), the weight and the bias; empties `kept`."""
    weight, bias, shard = head
    grad_hidden = torch.zeros_like(hidden, dtype=torch.float32)
    grad_weight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    grad_bias = None if bias is None else torch.empty_like(bias)
    kept.reverse()
    for block in head.blocks(len(hidden)):
        logits = kept.pop() if kept else None
        if block.width == 0:
            continue
        if logits is None:
            logits = head.logits(hidden, block)
        grad_logits = parts.grad_logits(grad_loss, logits, targets, block.begin, logsumexp, nll)
        if grad_bias is not None:
            grad_bias.narrow(0, *block).copy_(grad_logits.sum(dim=0))
        # Rounded as a 16-bit head would receive it; the products are summed in float32
        grad_logits = grad_logits.to(hidden.dtype)
        grad_hidden += float32_product(grad_logits, weight.narrow(0, *block))
        grad_weight.narrow(0, *block).copy_(float32_product(grad_logits.t(), hidden))
    return sum_over_ranks(shard, grad_hidden).to(hidden.dtype), grad_weight, grad_bias


class ShardedLinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, shard: VocabShard, targets: Targets, parts: LossParts):
        head = ShardedHead(weight, bias, shard)
        (loss, logsumexp, nll), _ = losses(head, hidden, targets, parts, kept_bytes=0)
        ctx.shard, ctx.targets, ctx.parts = shard, targets, parts
        ctx.save_for_backward(hidden, weight, bias, targets.ids, logsumexp, nll)
        return loss.view(targets.shape)

    @staticmethod
    @once_differentiable("linear_oput_loss")
    def backward(ctx, grad):
        hidden, weight, bias, ids, logsumexp, nll = ctx.saved_tensors
        head, targets = ShardedHead(weight, bias, ctx.shard), ctx.targets._replace(ids=ids)
        grads = gradients(head, hidden, targets, ctx.parts, grad.reshape(-1), logsumexp, nll, [])
        return *grads, None, None, None


class ShardedLinearLossSum(torch.autograd.Function):
    """sum_i factors_i loss_i, and the part of each pass [passes], without a gradient: only one
    factor is unknown when the gradients are made.
    """

    @staticmethod
    def forward(
        ctx, hidden, weight, bias, factors, shard: VocabShard, targets: Targets, parts: LossParts
    ):
        head = ShardedHead(weight, bias, shard)
        (loss, logsumexp, nll), kept = losses(head, hidden, targets, parts, KEPT_BYTES)
        ctx.grads = gradients(head, hidden, targets, parts, factors, logsumexp, nll, kept)
        ctx.shard, ctx.targets, ctx.parts = shard, targets, parts
        ctx.save_for_backward(hidden, weight, bias, targets.ids, factors, logsumexp, nll)
        addends = (loss * factors).view(targets.shape[0], -1).sum(1)
        ctx.mark_non_differentiable(addends)
        return addends.sum(), addends

    @staticmethod
    @once_differentiable("linear_oput_loss")
    def backward(ctx, grad, _):
        grads, ctx.grads = ctx.grads, None
        if grads is None:  # a second backward pass
            hidden, weight, bias, ids, factors, logsumexp, nll = ctx.saved_tensors
            head, targets = ShardedHead(weight, bias, ctx.shard), ctx.targets._replace(ids=ids)
            grads = gradients(head, hidden, targets, ctx.parts, grad * factors, logsumexp, nll, [])
        else:
            for each in grads:
                if each is not None:
                    torch.ops.dmax.linear_oput_loss_scale_(each, grad)
        return *grads, None, None, None, None
