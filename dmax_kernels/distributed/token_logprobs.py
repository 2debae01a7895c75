"""Log-probabilities of tokens, their ranks, and the most likely ones over a sharded vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from dmax_kernels import ops
from dmax_kernels.distributed.collectives import sum_over_ranks
from dmax_kernels.distributed.linear import Columns, ShardedHead, read_head
from dmax_kernels.distributed.logprob_parts import Found, Wanted, over_ranks
from dmax_kernels.distributed.visible_tokens import read_masked_logits, read_visible
from dmax_kernels.ops._linear_logprobs_autograd import check_one_id
from dmax_kernels.ops._logprob_blocks import Rows, gradients_of_head, kept_rows
from dmax_kernels.ops._register import once_differentiable
from dmax_kernels.ops.logprobs import TokenLogprobs, gradient_of_several


def token_logprobs(
    logits: Tensor,
    ids: Tensor,
    *,
    group: ProcessGroup | None = None,
    shard_sizes: Sequence[int] | None = None,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    top_n: int = 0,
    ignore_index: int = -100,
    suppress_tokens: Sequence[int] = (),
    allowed: Tensor | None = None,
) -> TokenLogprobs:
    """:func:`dmax_kernels.token_logprobs` of the whole vocabulary.

    Two collectives. An all-gather of 8 bytes per row and 4 per id (with ``top_n``, 4 + 12 top_n per
    row) has each shard's largest logits, the logarithm of its share of the softmax's denominator,
    and the logits of the ids that it holds. An all-reduce of 8 bytes per id then adds up how many
    tokens of each shard come before an id. A rank runs the unsharded op over its columns twice,
    however many ids there are, the second time over copies of 32 MB at a time. The backward pass
    has no collective.

    Args:
        logits: this rank's columns [..., V_shard], or a DTensor sharded on the last dimension.
        ids: int64 or int32, [...] or [..., n], of the whole vocabulary, the same on every rank.
        group, shard_sizes, vocab_size: see :mod:`dmax_kernels.distributed`.
        temperature, top_n, ignore_index: as in the unsharded op.
        suppress_tokens, allowed: as in the unsharded op, of the whole vocabulary.

    Returns:
        As the unsharded op, the same on every rank: ids and ranks exactly, log-probabilities to
        rounding. ``logprob`` is differentiable once, for one id per row and for several. Its
        gradient must be the same on every rank, too: call ``backward`` on every rank.

    Raises:
        ValueError: shards that do not fit together, a suppressed token or (CPU) an id out of range.
        RuntimeError: as the unsharded op.
    """
    op = "token_logprobs"
    mine, shard, allowed = read_masked_logits(
        op, logits, group, shard_sizes, vocab_size, -1, suppress_tokens, allowed
    )
    options = {"temperature": temperature, "top_n": top_n, "ignore_index": ignore_index}
    if shard.num_ranks == 1:
        return ops.token_logprobs(mine, ids, **options, allowed=allowed)
    # The unsharded op's checks, of logits that take no memory
    whole = mine.new_zeros(()).expand(*mine.shape[:-1], shard.vocab_size)
    torch.ops.dmax._check_token_logprobs(whole, ids, **options, allowed=allowed)
    wanted = Wanted.of(op, shard, ids, mine.dim(), allowed, **options)
    return TokenLogprobs(*_FromShard.apply(mine, wanted))


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    bias: Tensor | None = None,
    *,
    group: ProcessGroup | None = None,
    shard_sizes: Sequence[int] | None = None,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    top_n: int = 0,
    ignore_index: int = -100,
    suppress_tokens: Sequence[int] = (),
    allowed: Tensor | None = None,
) -> TokenLogprobs:
    """:func:`dmax_kernels.linear_token_logprobs` with the LM head's rows sharded.

    Logits are float32. Those of some rows at a time exist, 64 MB of them, and each such block of
    rows takes the two collectives of :func:`token_logprobs`. The backward pass takes one
    all-reduce, that of the hidden states' gradient in float32: these are replicated, and every rank
    returns their whole gradient.

    Args:
        hidden: [..., D], the same on every rank.
        weight: this rank's rows [V_shard, D], or a DTensor sharded on dimension 0.
        bias: this rank's [V_shard], or None.
        ids, group, shard_sizes, vocab_size: as in :func:`token_logprobs`.
        temperature, top_n, ignore_index, suppress_tokens, allowed: as in :func:`token_logprobs`.

    Returns:
        As the unsharded op, the same on every rank, unless two logits differ by less than the
        product's rounding error. With one id per row, ``logprob`` is differentiable once in hidden,
        weight and bias. The same tensors must require a gradient on every rank.

    Raises:
        ValueError: as :func:`token_logprobs`. RuntimeError: as the unsharded op.
    """
    op = "linear_token_logprobs"
    head = read_head(op, hidden, weight, bias, group, shard_sizes, vocab_size)
    shard = head.shard
    allowed = read_visible(
        op, shard, hidden.device, -1, suppress_tokens, allowed, as_mask=True
    ).allowed
    options = {"temperature": temperature, "top_n": top_n, "ignore_index": ignore_index}
    if shard.num_ranks == 1:
        return ops.linear_token_logprobs(
            hidden, head.weight, ids, head.bias, **options, allowed=allowed
        )
    whole = hidden.new_zeros(()).expand(shard.vocab_size, hidden.shape[-1])
    torch.ops.dmax._check_linear_token_logprobs(
        hidden, whole, ids, None, **options, allowed=allowed
    )
    wanted = Wanted.of(op, shard, ids, hidden.dim(), allowed, **options)
    return TokenLogprobs(*_FromShardedHead.apply(hidden, head.weight, head.bias, wanted))


def _returned(ctx, found: Found, wanted: Wanted, rows: torch.Size) -> tuple[Tensor, ...]:
    lists = (*rows, wanted.top_n)
    results = (
        found.logprob.view(wanted.shape), found.rank.view(wanted.shape),
        found.top_ids.view(lists), found.top_logprobs.view(lists),
    )  # fmt: skip
    ctx.mark_non_differentiable(*results[1:])
    ctx.wanted = wanted
    return results


class _FromShard(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, wanted: Wanted):
        flat = logits.reshape(len(wanted.ids), wanted.shard.width)
        found = over_ranks(flat, wanted, logits.dtype)
        logsumexp = found.best.double() / wanted.temperature + found.log_sum
        ctx.save_for_backward(logits, wanted.ids, wanted.allowed, logsumexp)
        return _returned(ctx, found, wanted, logits.shape[:-1])

    @staticmethod
    @once_differentiable("token_logprobs")
    def backward(ctx, grad_logprob, *_):
        logits, ids, allowed, logsumexp = ctx.saved_tensors
        wanted: Wanted = ctx.wanted._replace(ids=ids, allowed=allowed)
        if logits.numel() == 0:
            return torch.zeros_like(logits), None
        flat = logits.reshape(len(wanted.ids), logits.shape[-1])
        grad = gradient_of_several(
            grad_logprob.reshape(wanted.ids.shape), flat, wanted.ids, logsumexp,
            wanted.ignore_index, wanted.temperature, wanted.shard.start, wanted.shard.vocab_size,
        )  # fmt: skip
        return wanted.hide(grad).view(logits.shape), None


class _FromShardedHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, wanted: Wanted):
        head = ShardedHead(weight, bias, wanted.shard)
        flat = hidden.reshape(len(wanted.ids), hidden.shape[-1])
        blocks = [
            over_ranks(
                head.logits(flat[span], Columns(0, wanted.shard.width)), wanted.rows(span),
                hidden.dtype,
            )
            for span in head.row_blocks(len(flat))
        ]  # fmt: skip
        found = Found(*(torch.cat(parts) for parts in zip(*blocks, strict=True)))
        kept = (wanted.ids, wanted.allowed, found.best, found.log_sum)
        ctx.save_for_backward(hidden, weight, bias, *kept)
        return _returned(ctx, found, wanted, hidden.shape[:-1])

    @staticmethod
    @once_differentiable("linear_token_logprobs")
    def backward(ctx, grad_logprob, *_):
        hidden, weight, bias, ids, allowed, best, log_sum = ctx.saved_tensors
        wanted: Wanted = ctx.wanted._replace(ids=ids, allowed=allowed)
        check_one_id(wanted.shape, hidden)
        ids = wanted.ids.squeeze(1)
        flat = kept_rows(hidden, ids, wanted.ignore_index)
        zero = torch.zeros_like(log_sum)
        known = (wanted.known | ~wanted.used).squeeze(1)
        rows = Rows(best, log_sum, zero, ids, torch.where(known, 0.0, torch.nan))
        head = ShardedHead(weight, bias, wanted.shard)
        grad_hidden, *grads = gradients_of_head(
            head.logit_blocks(flat), flat, weight, bias, rows, ids, grad_logprob, None,
            wanted.shard.start, (wanted.temperature, wanted.ignore_index),
            ctx.needs_input_grad[:3], wanted.mask(len(weight)),
        )  # fmt: skip
        if grad_hidden is not None:
            grad_hidden = sum_over_ranks(wanted.shard, grad_hidden)
            grad_hidden = grad_hidden.to(flat.dtype).view(hidden.shape)
        return grad_hidden, *grads, None
