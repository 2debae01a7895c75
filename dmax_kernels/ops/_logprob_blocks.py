"""Blocks of logits for target_logprobs: what they add to a row's statistics, and their gradients.

The forward pass reads each logit once, through row_statistics, and merges blocks in float64. The
gradient is made a block at a time, so that no softmax is stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dmax_kernels.ops._register import once_differentiable
from dmax_kernels.vocabulary import allowed_tokens, shard_mask

# Float32 logits that exist at a time, unless LEAST_COLUMNS of all rows take more
BLOCK_BYTES = 32 << 20
LEAST_COLUMNS = 4096


class Rows(NamedTuple):
    """Per row: the largest logit, log of the softmax's denominator relative to it, the rest."""

    best: Tensor  # float32
    log_sum: Tensor  # float64, with log p_v = (x_v - best) / temperature - log_sum
    entropy: Tensor  # float64
    token: Tensor
    target_logit: Tensor  # float32, NaN until its block has been seen


def no_rows(target: Tensor) -> Rows:
    """The statistics of no columns, which merge as columns of -inf do."""

    def full(value: float, dtype: torch.dtype) -> Tensor:
        return torch.full(target.shape, value, dtype=dtype, device=target.device)

    return Rows(
        full(-torch.inf, torch.float32), full(0.0, torch.float64), full(0.0, torch.float64),
        full(0, torch.int64), full(torch.nan, torch.float32),
    )  # fmt: skip


def block_rows(logits: Tensor, target: Tensor, first: int, temperature: float) -> Rows:
    """The statistics of some columns, logits [rows, n] of ids from `first` on."""
    token, confidence, _, entropy, _ = torch.ops.dmax.row_statistics(
        logits, temperature=temperature
    )
    best = logits.gather(1, token.unsqueeze(1)).squeeze(1).float()
    place = target - first
    here = (place >= 0) & (place < logits.shape[1])
    at_target = logits.gather(1, torch.where(here, place, 0).unsqueeze(1)).squeeze(1).float()
    return Rows(
        best,
        -confidence.double().log(),
        entropy.double(),
        token + first,
        torch.where(here, at_target, torch.nan),
    )


def merge_rows(rows: Rows, later: Rows, temperature: float) -> Rows:
    """The statistics with those of later columns."""
    # Columns of nothing but -inf have no mass; NaN and +inf spread to the row
    nothing, nothing_before = later.best == -torch.inf, rows.best == -torch.inf
    is_later = (later.best > rows.best) | (later.best.isnan() & ~rows.best.isnan())
    top = torch.where(is_later, later.best, rows.best)

    def mass(rows, nothing):
        exponent = (rows.best.double() - top.double()) / temperature + rows.log_sum
        return exponent.masked_fill(nothing, -torch.inf)

    mine, before = mass(later, nothing), mass(rows, nothing_before)
    total = torch.logaddexp(mine, before)
    share, share_before = (mine - total).exp(), (before - total).exp()

    def part(share, entropy):  # of the entropy: share (entropy - log share), and 0 for no share
        return torch.where(share == 0, 0.0, share * entropy) + torch.special.entr(share)

    return Rows(
        top,
        total,
        part(share, later.entropy) + part(share_before, rows.entropy),
        torch.where(is_later, later.token, rows.token),
        torch.where(later.target_logit.isnan(), rows.target_logit, later.target_logit),
    )


def results_of(
    rows: Rows, target: Tensor, temperature: float, ignore_index: int
) -> tuple[Tensor, ...]:
    """(logprob, entropy, token, correct) as the functions return them."""
    ignored = target == ignore_index
    undefined = ~rows.best.isfinite()
    logprob = (rows.target_logit.double() - rows.best.double()) / temperature - rows.log_sum
    logprob = logprob.masked_fill(undefined, torch.nan).masked_fill(ignored, 0.0)
    entropy = rows.entropy.masked_fill(undefined, torch.nan).masked_fill(ignored, 0.0)
    token = rows.token.masked_fill(ignored, -1)
    return logprob.float(), entropy.float(), token, (token == target) & ~ignored


def grad_block(
    logits: Tensor, rows: Rows, target: Tensor, grad_logprob: Tensor | None,
    grad_entropy: Tensor | None, first: int, temperature: float, ignore_index: int,
) -> Tensor:  # fmt: skip
    """The gradient of some columns' logits, float32; an ignored row's is 0.

    With a gradient of the log-probability alone it is that of a cross-entropy, which the loss's
    kernel makes in one read and one write: on a CPU in 0.3 of the time of PyTorch's operations at
    131,072 float32 columns, and in 0.4 at bfloat16.
    """
    place = target - first
    here = (place >= 0) & (place < logits.shape[1])
    place = torch.where(here, place, 0).unsqueeze(1)
    ignored = target == ignore_index
    # A target that is no token has no logit
    broken = ~rows.best.isfinite() | rows.target_logit.isnan()
    if grad_entropy is None and grad_logprob is not None:
        x = logits - rows.best.unsqueeze(1)  # float32, and the logsumexp stays small and exact
        grad = torch.ops.dmax.oput_loss_backward(
            -grad_logprob, x, torch.where(ignored, -1, place.squeeze(1)),
            rows.log_sum.masked_fill(broken, torch.nan).float(), ignore_index=-1,
            temperature=temperature,
        )  # fmt: skip
        log_p = x.gather(1, place).double() / temperature - rows.log_sum.unsqueeze(1)
        # 1 - p without cancellation, and -p at a place that is not the target's
        value = torch.where(here.unsqueeze(1), -torch.expm1(log_p), -log_p.exp())
        value = grad_logprob.double().unsqueeze(1) * value / temperature
        value = value.masked_fill(broken.unsqueeze(1), torch.nan)
        return grad.scatter_(1, place, value.masked_fill(ignored.unsqueeze(1), 0.0).float())

    zero = torch.zeros_like(rows.best)
    g_logprob, g_entropy = (
        (zero if g is None else g).unsqueeze(1) for g in (grad_logprob, grad_entropy)
    )
    x = logits.float()
    log_sum, entropy = rows.log_sum.float().unsqueeze(1), rows.entropy.float().unsqueeze(1)
    log_p = (x - rows.best.unsqueeze(1)) / temperature - log_sum
    log_p.clamp_(min=-1e4)  # where p is 0: 0 times infinity would be NaN
    p = log_p.exp()
    grad = p * (-g_logprob - g_entropy * (log_p + entropy))
    # 1 - p without cancellation
    at = log_p.gather(1, place)
    value = -g_logprob * torch.expm1(at) - g_entropy * at.exp() * (at + entropy)
    grad.scatter_(1, place, torch.where(here.unsqueeze(1), value, grad.gather(1, place)))
    grad = grad.div_(temperature).masked_fill_(broken.unsqueeze(1), torch.nan)
    return grad.masked_fill_(ignored.unsqueeze(1), 0.0)


def part_of(grad: Tensor | None, span: slice = slice(None)) -> Tensor | None:
    """The upstream gradient of some of the flattened rows."""
    return None if grad is None else grad.reshape(-1)[span]


def grad_of_logits(
    logits: Tensor, rows: Rows, target: Tensor, grad_logprob: Tensor | None,
    grad_entropy: Tensor | None, first: int, temperature: float, ignore_index: int,
) -> Tensor:  # fmt: skip
    """The gradient of the logits [rows, n] of ids from `first` on, in their dtype."""
    grad = torch.empty_like(logits)
    step = max(1, BLOCK_BYTES // (4 * max(logits.shape[1], 1)))
    for begin in range(0, len(logits) if logits.numel() else 0, step):
        span = slice(begin, begin + step)
        grad[span] = grad_block(
            logits[span], Rows(*(t[span] for t in rows)), target[span],
            part_of(grad_logprob, span), part_of(grad_entropy, span), first, temperature,
            ignore_index,
        )  # fmt: skip
    return grad


def float32_product(a: Tensor, b: Tensor) -> Tensor:
    if a.is_meta:  # has no autocast
        return a.float() @ b.float()
    with torch.autocast(a.device.type, enabled=False):  # autocast would round the result to 16 bits
        if a.is_cuda and a.dtype != torch.float32:
            return torch.mm(a, b, out_dtype=torch.float32)
        return a.float() @ b.float()


Blocks = Iterable[tuple[slice, Tensor]]  # rows of the head, their float32 logits [rows, n]


def blocks_of(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """Logits until the vocabulary's end."""
    columns = BLOCK_BYTES // (4 * max(len(rows), 1)) // LEAST_COLUMNS * LEAST_COLUMNS
    columns = max(columns, LEAST_COLUMNS)
    for first in range(0, len(weight) if len(rows) else 0, columns):
        ids = slice(first, min(first + columns, len(weight)))
        logits = float32_product(rows, weight[ids].t())
        yield ids, logits if bias is None else logits.add_(bias[ids])


def kept_rows(hidden: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """Hidden states [rows, D], 0 in ignored rows: 0 times a NaN would reach weight's gradient."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    return flat.masked_fill((target == ignore_index).unsqueeze(1), 0)


def rows_of_head(blocks: Blocks, target: Tensor, start: int, temperature: float) -> Rows:
    """The statistics of a head whose first row is id `start`."""
    rows = no_rows(target)
    for span, logits in blocks:
        later = block_rows(logits, target, start + span.start, temperature)
        rows = merge_rows(rows, later, temperature) if span.start else later
    return rows


def gradients_of_head(
    blocks: Blocks, flat: Tensor, weight: Tensor, bias: Tensor | None, rows: Rows, target: Tensor,
    grad_logprob: Tensor | None, grad_entropy: Tensor | None, start: int,
    options: tuple[float, int], needs: tuple[bool, bool, bool], allowed: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Of the hidden states (in float32), the weight and the bias; None for what is not needed.

    ``allowed``, [rows or 1, words], masks the tokens whose logits were -inf in the forward pass.
    """
    grad_hidden = torch.zeros_like(flat, dtype=torch.float32) if needs[0] else None
    grad_weight = torch.zeros_like(weight) if needs[1] else None
    grad_bias = torch.zeros_like(bias) if needs[2] and bias is not None else None
    upstream = part_of(grad_logprob), part_of(grad_entropy)
    for span, logits in blocks:
        grad = grad_block(logits, rows, target, *upstream, start + span.start, *options)
        if allowed is not None:
            mask = shard_mask(allowed, span.start, logits.shape[1])
            grad.masked_fill_(~allowed_tokens(mask, logits.shape[1]), 0.0)
        if grad_bias is not None:
            grad_bias[span] = grad.sum(dim=0)
        grad = grad.to(flat.dtype)  # as a 16-bit head would receive it
        if grad_hidden is not None:
            grad_hidden += float32_product(grad, weight[span])
        if grad_weight is not None:
            grad_weight[span] = float32_product(grad.t(), flat)
    return grad_hidden, grad_weight, grad_bias


def finish(
    ctx, inputs: tuple[Tensor | None, ...], rows: Rows, ids: Tensor, target: Tensor,
    temperature: float, ignore_index: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The results of an autograd Function, which keeps what its backward pass needs."""
    results = results_of(rows, ids, temperature, ignore_index)
    ctx.save_for_backward(*inputs, ids, *rows)
    ctx.options = (temperature, ignore_index)
    results = tuple(t.view(target.shape) for t in results)
    ctx.mark_non_differentiable(*results[2:])
    ctx.set_materialize_grads(False)  # the entropy's is often not there
    return results


class FromLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target, temperature, ignore_index):
        flat, ids = logits.detach().reshape(-1, logits.shape[-1]), target.reshape(-1).long()
        rows = block_rows(flat, ids, 0, temperature) if ids.numel() else no_rows(ids)
        return finish(ctx, (logits,), rows, ids, target, temperature, ignore_index)

    @staticmethod
    @once_differentiable("target_logprobs")
    def backward(ctx, grad_logprob, grad_entropy, *_):
        logits, ids, *rows = ctx.saved_tensors
        flat = logits.reshape(-1, logits.shape[-1])
        grad = grad_of_logits(flat, Rows(*rows), ids, grad_logprob, grad_entropy, 0, *ctx.options)
        return grad.view(logits.shape), None, None, None


class FromHidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, target, temperature, ignore_index):
        ids = target.reshape(-1).long()
        flat = kept_rows(hidden, ids, ignore_index)
        rows = rows_of_head(blocks_of(flat, weight, bias), ids, 0, temperature)
        ctx.shape = hidden.shape
        return finish(ctx, (flat, weight, bias), rows, ids, target, temperature, ignore_index)

    @staticmethod
    @once_differentiable("linear_target_logprobs")
    def backward(ctx, grad_logprob, grad_entropy, *_):
        flat, weight, bias, ids, *rows = ctx.saved_tensors
        grad_hidden, *grads = gradients_of_head(
            blocks_of(flat, weight, bias), flat, weight, bias, Rows(*rows), ids, grad_logprob,
            grad_entropy, 0, ctx.options, ctx.needs_input_grad[:3],
        )  # fmt: skip
        if grad_hidden is not None:
            grad_hidden = grad_hidden.to(flat.dtype).view(ctx.shape)
        return grad_hidden, *grads, None, None, None
