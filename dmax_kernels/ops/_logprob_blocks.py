"""Blocks of logits for target_logprobs: what they add to a row's statistics, and their gradients.

The forward pass reads each logit once, through row_statistics, and merges blocks in float64. The
gradient is plain PyTorch on a block at a time, so that no softmax is stored.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Float32 logits that exist at a time, unless LEAST_COLUMNS of all rows take more
BLOCK_BYTES = 32 << 20
LEAST_COLUMNS = 4096


class _Rows(NamedTuple):
    """Per row: the largest logit, log of the softmax's denominator relative to it, the rest."""

    best: Tensor  # float32
    log_sum: Tensor  # float64, with log p_v = (x_v - best) / temperature - log_sum
    entropy: Tensor  # float64
    token: Tensor
    target_logit: Tensor  # float32, NaN until its block has been seen


def _first_rows(target: Tensor) -> _Rows:
    def full(value: float, dtype: torch.dtype) -> Tensor:
        return torch.full(target.shape, value, dtype=dtype, device=target.device)

    return _Rows(
        full(-torch.inf, torch.float32), full(0.0, torch.float64), full(0.0, torch.float64),
        full(-1, torch.int64), full(torch.nan, torch.float32),
    )  # fmt: skip


def _add_block(
    rows: _Rows, logits: Tensor, target: Tensor, first: int, temperature: float
) -> _Rows:
    """The statistics with those of the next columns, logits [rows, n] of ids from `first` on."""
    token, confidence, _, entropy, _ = torch.ops.dmax.row_statistics(
        logits, temperature=temperature
    )
    best = logits.gather(1, token.unsqueeze(1)).squeeze(1).float()
    place = target - first
    here = (place >= 0) & (place < logits.shape[1])
    at_target = logits.gather(1, torch.where(here, place, 0).unsqueeze(1)).squeeze(1).float()
    target_logit = torch.where(here, at_target, rows.target_logit)
    log_sum, entropy = -confidence.double().log(), entropy.double()
    token = token + first
    if first == 0:
        return _Rows(best, log_sum, entropy, token, target_logit)
    # A block of nothing but -inf has no mass; NaN and +inf spread to the row
    nothing, nothing_before = best == -torch.inf, rows.best == -torch.inf
    top = torch.where((best > rows.best) | best.isnan(), best, rows.best)

    def mass(best, log_sum, nothing):
        exponent = (best.double() - top.double()) / temperature + log_sum
        return exponent.masked_fill(nothing, -torch.inf)

    mine, before = mass(best, log_sum, nothing), mass(rows.best, rows.log_sum, nothing_before)
    total = torch.logaddexp(mine, before)
    share, share_before = (mine - total).exp(), (before - total).exp()

    def part(share, entropy):  # of the entropy: share (entropy - log share), and 0 for no share
        return torch.where(share == 0, 0.0, share * entropy) + torch.special.entr(share)

    later = (best > rows.best) | (best.isnan() & ~rows.best.isnan())
    return _Rows(
        top,
        total,
        part(share, entropy) + part(share_before, rows.entropy),
        torch.where(later, token, rows.token),
        target_logit,
    )


def _results(
    rows: _Rows, target: Tensor, temperature: float, ignore_index: int
) -> tuple[Tensor, ...]:
    """(logprob, entropy, token, correct) as the functions return them."""
    ignored = target == ignore_index
    undefined = ~rows.best.isfinite()
    logprob = (rows.target_logit.double() - rows.best.double()) / temperature - rows.log_sum
    logprob = logprob.masked_fill(undefined, torch.nan).masked_fill(ignored, 0.0)
    entropy = rows.entropy.masked_fill(undefined, torch.nan).masked_fill(ignored, 0.0)
    token = rows.token.masked_fill(ignored, -1)
    return logprob.float(), entropy.float(), token, (token == target) & ~ignored


def _grad_block(
    logits: Tensor, rows: _Rows, target: Tensor, grad_logprob: Tensor, grad_entropy: Tensor,
    first: int, temperature: float, ignore_index: int,
) -> Tensor:  # fmt: skip
    """The gradient of some columns' logits, float32; an ignored row's is 0."""
    x = logits.float()
    log_sum, entropy = rows.log_sum.float().unsqueeze(1), rows.entropy.float().unsqueeze(1)
    log_p = (x - rows.best.unsqueeze(1)) / temperature - log_sum
    log_p.clamp_(min=-1e4)  # where p is 0: 0 times infinity would be NaN
    g_logprob, g_entropy = grad_logprob.unsqueeze(1), grad_entropy.unsqueeze(1)
    p = log_p.exp()
    grad = p * (-g_logprob - g_entropy * (log_p + entropy))
    # 1 - p without cancellation
    place = target - first
    here = ((place >= 0) & (place < x.shape[1])).unsqueeze(1)
    place = torch.where(here, place.unsqueeze(1), 0)
    at = log_p.gather(1, place)
    value = -g_logprob * torch.expm1(at) - g_entropy * at.exp() * (at + entropy)
    grad.scatter_(1, place, torch.where(here, value, grad.gather(1, place)))
    # A target that is no token has no logit
    broken = ~rows.best.isfinite() | rows.target_logit.isnan()
    grad = grad.div_(temperature).masked_fill_(broken.unsqueeze(1), torch.nan)
    return grad.masked_fill_((target == ignore_index).unsqueeze(1), 0.0)


class FromLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target, temperature, ignore_index):
        flat, ids = logits.detach().reshape(-1, logits.shape[-1]), target.reshape(-1).long()
        rows = _first_rows(ids)
        if ids.numel():
            rows = _add_block(rows, flat, ids, 0, temperature)
        results = tuple(
            t.view(target.shape) for t in _results(rows, ids, temperature, ignore_index)
        )
        ctx.save_for_backward(logits, ids, *rows)
        ctx.options = (temperature, ignore_index)
        ctx.mark_non_differentiable(*results[2:])
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprob, grad_entropy, *_):
        logits, ids, *rows = ctx.saved_tensors
        flat = logits.reshape(-1, logits.shape[-1])
        grad = torch.empty_like(flat)
        step = max(1, BLOCK_BYTES // (4 * flat.shape[1]))
        for first in range(0, len(flat), step):
            span = slice(first, first + step)
            grad[span] = _grad_block(
                flat[span], _Rows(*(t[span] for t in rows)), ids[span],
                grad_logprob.reshape(-1)[span], grad_entropy.reshape(-1)[span], 0, *ctx.options,
            )  # fmt: skip
        return grad.view(logits.shape), None, None, None


def _float32_product(a: Tensor, b: Tensor) -> Tensor:
    with torch.autocast(a.device.type, enabled=False):  # autocast would round the result to 16 bits
        if a.is_cuda and a.dtype != torch.float32:
            return torch.mm(a, b, out_dtype=torch.float32)
        return a.float() @ b.float()


def _blocks(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """(ids, their float32 logits [rows, n]) until the vocabulary's end."""
    columns = BLOCK_BYTES // (4 * max(len(rows), 1)) // LEAST_COLUMNS * LEAST_COLUMNS
    columns = max(columns, LEAST_COLUMNS)
    for first in range(0, len(weight), columns):
        ids = slice(first, min(first + columns, len(weight)))
        logits = _float32_product(rows, weight[ids].t())
        yield ids, logits if bias is None else logits.add_(bias[ids])


class FromHidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, target, temperature, ignore_index):
        ids = target.reshape(-1).long()
        # An ignored row's hidden state is not used: 0 times a NaN would reach weight's gradient
        flat = hidden.reshape(-1, hidden.shape[-1])
        flat = flat.masked_fill((ids == ignore_index).unsqueeze(1), 0)
        rows = _first_rows(ids)
        if ids.numel():
            for span, logits in _blocks(flat, weight, bias):
                rows = _add_block(rows, logits, ids, span.start, temperature)
        results = tuple(
            t.view(target.shape) for t in _results(rows, ids, temperature, ignore_index)
        )
        ctx.save_for_backward(flat, weight, bias, ids, *rows)
        ctx.shape, ctx.options = hidden.shape, (temperature, ignore_index)
        ctx.mark_non_differentiable(*results[2:])
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprob, grad_entropy, *_):
        flat, weight, bias, ids, *rows = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.zeros_like(flat, dtype=torch.float32)
        grad_weight = torch.zeros_like(weight) if needs_weight else None
        grad_bias = torch.zeros_like(bias) if needs_bias else None
        upstream = grad_logprob.reshape(-1), grad_entropy.reshape(-1)
        for span, logits in _blocks(flat, weight, bias) if len(flat) else ():
            grad = _grad_block(logits, _Rows(*rows), ids, *upstream, span.start, *ctx.options)
            if grad_bias is not None:
                grad_bias[span] = grad.sum(dim=0)
            grad = grad.to(flat.dtype)  # as a 16-bit head would receive it
            if needs_hidden:
                grad_hidden += _float32_product(grad, weight[span])
            if grad_weight is not None:
                grad_weight[span] = _float32_product(grad.t(), flat)
        grad_hidden = grad_hidden.to(flat.dtype).view(ctx.shape) if needs_hidden else None
        return grad_hidden, grad_weight, grad_bias, None, None, None
