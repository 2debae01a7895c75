"""Eqs. 5-6: per-token cross-entropy of both passes, and its gradient."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dmax_kernels.triton.launch import (
    TILE,
    TILE_WARPS,
    Rows,
    choose_tiles,
    device_of,
    next_power_of_2,
    row_view,
)
from dmax_kernels.triton.stats import (
    finite_or_zero,
    load_tile,
    merge_sums,
    softmax_scale,
    sum_of_exponentials,
    tiles_of_program,
)


@triton.jit
def store_tile_sums(
    row, tile, vocab, scale, out_max, out_sum, out_below, MASKED: tl.constexpr,
    SMOOTHED: tl.constexpr, TILE: tl.constexpr,
):
    ids, x = load_tile(row, tile * TILE, vocab, -1, MASKED, TILE)
    maximum = tl.max(x, axis=0)
    tl.store(out_max + tile, maximum)
    tl.store(out_sum + tile, sum_of_exponentials(x, maximum, scale))
    if SMOOTHED:
        # Relative to the maximum: a plain sum would lose its digits to an offset common to all
        below = tl.where(ids < vocab, finite_or_zero(maximum) - x, 0.0)
        tl.store(out_below + tile, tl.sum(below, axis=0))


@triton.jit(do_not_specialize=["ignore_index", "num_tiles", "tiles_per_program"])
def tile_sums_kernel(
    logits, row_stride, vocab, target, ignore_index, scale,
    partial_max, partial_sum, partial_below, num_tiles, tiles_per_program,
    SMOOTHED: tl.constexpr, TILE: tl.constexpr,
):
    row_id = tl.program_id(0).to(tl.int64)
    if tl.load(target + row_id) == ignore_index:
        return
    row = logits + row_id * row_stride
    out_max = partial_max + row_id * num_tiles
    out_sum = partial_sum + row_id * num_tiles
    out_below = partial_below + row_id * num_tiles

    first, last, full_tiles = tiles_of_program(num_tiles, tiles_per_program, vocab, TILE)
    for tile in range(first, tl.minimum(last, full_tiles)):
        store_tile_sums(
            row, tile, vocab, scale, out_max, out_sum, out_below, False, SMOOTHED, TILE
        )
    if last > full_tiles:
        store_tile_sums(
            row, full_tiles, vocab, scale, out_max, out_sum, out_below, True, SMOOTHED, TILE
        )


@triton.jit
def merge_log_sums(maxima, sums, scale):
    """A row's partial results -> (largest logit, what the logsumexp of the logits / temperature has
    above it / temperature); an infinite maximum leaves NaN.
    """
    best = tl.max(maxima, axis=0)
    log_sum = tl.log(merge_sums(maxima, sums, best, scale))
    return best, tl.where(tl.abs(best) == float("inf"), float("nan"), log_sum)


@triton.jit
def loss_of_row(
    best, log_sum, target_logit, mean_below, inverse_temperature, label_smoothing, z_loss,
    SMOOTHED: tl.constexpr,
):
    """(loss, lse) of x = logits / temperature: (1 - s) (lse - x_target) + s (lse - mean(x)) +
    z lse^2, with lse = best / temperature + log_sum.

    mean_below is best - mean(logits), read only where SMOOTHED.
    """
    # The difference first: it is exact where the target is the best
    loss = (best - target_logit) * inverse_temperature + log_sum
    if SMOOTHED:
        mean_below = mean_below * inverse_temperature
        loss = (1.0 - label_smoothing) * loss + label_smoothing * (log_sum + mean_below)
    lse = best * inverse_temperature + log_sum
    return loss + tl.where(z_loss > 0.0, z_loss * lse * lse, 0.0), lse  # 0 * inf would be NaN


@triton.jit
def grad_of_logits(probability, is_target, g, lse, vocab, label_smoothing, z_loss):
    """g [(1 + 2 z lse) softmax - (1 - s) onehot - s / V]."""
    grad = (1.0 + 2.0 * z_loss * lse) * probability
    # The -1 joins before rounding: near probability 1 a 16-bit float would cancel
    grad -= tl.where(is_target, 1.0 - label_smoothing, 0.0)
    return g * (grad - label_smoothing / vocab)


@triton.jit(do_not_specialize=["ignore_index", "num_tiles"])
def loss_kernel(
    logits, row_stride, vocab, target, ignore_index, scale, inverse_temperature, label_smoothing,
    z_loss, partial_max, partial_sum, partial_below, num_tiles, loss, logsumexp, row_max,
    row_log_sum,
    SMOOTHED: tl.constexpr, KEEP_PARTS: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target_id = tl.load(target + row).to(tl.int64)
    if target_id == ignore_index:
        tl.store(loss + row, 0.0)
        tl.store(logsumexp + row, 0.0)
        return

    # Merge the tiles: logsumexp = maximum / temperature + log(sum of exponentials)
    tiles = tl.arange(0, TILES)
    valid = tiles < num_tiles
    at = row * num_tiles + tiles
    maxima = tl.load(partial_max + at, mask=valid, other=float("-inf"))
    sums = tl.load(partial_sum + at, mask=valid, other=0.0)
    best, log_sum = merge_log_sums(maxima, sums, scale)

    # A target outside the vocabulary is not read and makes this row's loss NaN
    known = (target_id >= 0) & (target_id < vocab)
    x = tl.load(logits + row * row_stride + target_id, mask=known, other=float("nan"))
    x = x.to(tl.float32)
    mean_below = 0.0
    if SMOOTHED:  # from every tile's sum of (maximum - x)
        below = tl.load(partial_below + at, mask=valid, other=0.0)
        in_tile = tl.minimum(vocab - tiles * TILE, TILE).to(tl.float32)
        below += tl.where(valid & (maxima != best), in_tile * (best - maxima), 0.0)
        mean_below = tl.sum(below, axis=0) / vocab
    value, lse = loss_of_row(
        best, log_sum, x, mean_below, inverse_temperature, label_smoothing, z_loss, SMOOTHED
    )
    tl.store(loss + row, tl.where(known, value, float("nan")))
    tl.store(logsumexp + row, lse)
    if KEEP_PARTS:
        tl.store(row_max + row, best)
        tl.store(row_log_sum + row, log_sum)


@triton.jit
def store_tile_grad(
    row, out, tile, vocab, target_id, reference, log_sum, lse, g, scale, label_smoothing, z_loss,
    MASKED: tl.constexpr, TILE: tl.constexpr,
):
    ids, x = load_tile(row, tile * TILE, vocab, -1, MASKED, TILE)
    probability = tl.exp2(((x - reference) - log_sum) * scale)
    grad = grad_of_logits(
        probability, ids == target_id, g, lse, vocab, label_smoothing, z_loss
    )
    if MASKED:
        tl.store(out + ids, grad.to(out.dtype.element_ty), mask=ids < vocab)
    else:
        tl.store(out + ids, grad.to(out.dtype.element_ty))


@triton.jit
def store_tile_fill(out, tile, vocab, value, TILE: tl.constexpr):
    ids = tile * TILE + tl.arange(0, TILE)
    filled = tl.zeros([TILE], tl.float32) + value
    tl.store(out + ids, filled.to(out.dtype.element_ty), mask=ids < vocab)


@triton.jit(do_not_specialize=["ignore_index", "num_tiles", "tiles_per_program"])
def grad_kernel(
    logits, row_stride, vocab, target, ignore_index, grad_loss, row_max, row_log_sum,
    temperature, inverse_temperature, scale, label_smoothing, z_loss, grad_logits, grad_stride,
    num_tiles, tiles_per_program,
    HAS_GRAD: tl.constexpr, HAS_PARTS: tl.constexpr, TILE: tl.constexpr,
):
    """grad_logits may be logits. row_max is the logsumexp where HAS_PARTS is false."""
    row_id = tl.program_id(0).to(tl.int64)
    row = logits + row_id * row_stride
    out = grad_logits + row_id * grad_stride
    target_id = tl.load(target + row_id).to(tl.int64)
    first, last, full_tiles = tiles_of_program(num_tiles, tiles_per_program, vocab, TILE)

    # Rows without a gradient: 0 where ignored, NaN where the target is no token
    known = (target_id >= 0) & (target_id < vocab)
    ignored = target_id == ignore_index
    if ignored | (known == 0):
        for tile in range(first, last):
            store_tile_fill(out, tile, vocab, tl.where(ignored, 0.0, float("nan")), TILE)
        return

    g = inverse_temperature
    if HAS_GRAD:
        g *= tl.load(grad_loss + row_id)
    reference = tl.load(row_max + row_id)
    log_sum = 0.0
    if HAS_PARTS:
        log_sum = tl.load(row_log_sum + row_id)
        lse = reference * inverse_temperature + log_sum
        log_sum *= temperature  # as the logits are before they are divided
    else:
        lse = reference
        reference *= temperature
    for tile in range(first, tl.minimum(last, full_tiles)):
        store_tile_grad(
            row, out, tile, vocab, target_id, reference, log_sum, lse, g, scale,
            label_smoothing, z_loss, False, TILE,
        )
    if last > full_tiles:
        store_tile_grad(
            row, out, full_tiles, vocab, target_id, reference, log_sum, lse, g, scale,
            label_smoothing, z_loss, True, TILE,
        )


class PassLoss(NamedTuple):
    """The results of one pass, [rows] each, with logsumexp = row_max / temperature + log_sum."""

    loss: Tensor
    logsumexp: Tensor
    row_max: Tensor | None
    log_sum: Tensor | None


def pass_loss(
    rows: Rows, target: Tensor, ignore_index: int, label_smoothing: float, z_loss: float,
    temperature: float, keep_parts: bool = False,
) -> PassLoss:
    def per_row() -> Tensor:
        return torch.empty(target.shape, dtype=torch.float32, device=target.device)

    result = PassLoss(
        per_row(), per_row(), *((per_row(), per_row()) if keep_parts else (None, None))
    )
    if rows.count == 0:
        return result
    tiles = choose_tiles(rows.count, rows.width, target.device)
    smoothed = label_smoothing > 0
    partials = [
        torch.empty((rows.count, tiles.count), dtype=torch.float32, device=target.device)
        for _ in range(3 if smoothed else 2)
    ]
    if not smoothed:
        partials.append(partials[0])  # never read or written
    tile_sums_kernel[(rows.count, tiles.programs)](
        rows.tensor, rows.stride, rows.width, target, ignore_index, softmax_scale(temperature),
        *partials, tiles.count, tiles.per_program,
        SMOOTHED=smoothed, TILE=TILE, num_warps=TILE_WARPS,
    )
    loss_kernel[(rows.count,)](
        rows.tensor, rows.stride, rows.width, target, ignore_index, softmax_scale(temperature),
        1.0 / temperature, float(label_smoothing), float(z_loss), *partials, tiles.count, *result,
        SMOOTHED=smoothed, KEEP_PARTS=keep_parts, TILES=next_power_of_2(tiles.count), TILE=TILE,
        num_warps=1,
    )
    return result


def write_grad(
    rows: Rows, out: Rows, target: Tensor, grad_loss: Tensor | None, row_max: Tensor,
    log_sum: Tensor | None, ignore_index: int, label_smoothing: float, z_loss: float,
    temperature: float,
) -> None:
    if rows.count == 0:
        return
    tiles = choose_tiles(rows.count, rows.width, target.device)
    grad_kernel[(rows.count, tiles.programs)](
        rows.tensor, rows.stride, rows.width, target, ignore_index, grad_loss, row_max, log_sum,
        float(temperature), 1.0 / temperature, softmax_scale(temperature),
        float(label_smoothing), float(z_loss), out.tensor, out.stride,
        tiles.count, tiles.per_program,
        HAS_GRAD=grad_loss is not None, HAS_PARTS=log_sum is not None,
        TILE=TILE, num_warps=TILE_WARPS,
    )


def oput_loss(
    logits_masked: Tensor | None,
    logits_predicted: Tensor | None,
    target: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:

    def one_pass(logits: Tensor | None) -> tuple[Tensor, Tensor]:
        if logits is None:
            absent = torch.empty(0, dtype=torch.float32, device=target.device)
            return absent, absent.clone()
        result = pass_loss(
            row_view(logits), target.contiguous(), ignore_index, label_smoothing, z_loss,
            temperature,
        )
        return result.loss, result.logsumexp

    with device_of(target):
        loss_masked, logsumexp_masked = one_pass(logits_masked)
        loss_predicted, logsumexp_predicted = one_pass(logits_predicted)
    return loss_masked, loss_predicted, logsumexp_masked, logsumexp_predicted


def oput_loss_backward(
    grad_loss: Tensor,
    logits: Tensor,
    target: Tensor,
    logsumexp: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    temperature: float = 1.0,
) -> Tensor:
    grad_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    with device_of(logits):
        write_grad(
            row_view(logits), row_view(grad_logits), target.contiguous(), grad_loss.contiguous(),
            logsumexp.contiguous(), None, ignore_index, label_smoothing, z_loss, temperature,
        )
    return grad_logits


def oput_loss_and_grad_(
    logits_masked: Tensor | None,
    logits_predicted: Tensor | None,
    target: Tensor,
    grad_masked: Tensor | None = None,
    grad_predicted: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:

    def one_pass(logits: Tensor | None, grad: Tensor | None) -> Tensor:
        if logits is None:
            return torch.empty(0, dtype=torch.float32, device=target.device)
        rows = row_view(logits)
        targets = target.contiguous()
        options = (ignore_index, label_smoothing, z_loss, temperature)
        result = pass_loss(rows, targets, *options, keep_parts=True)
        write_grad(
            rows, rows, targets, None if grad is None else grad.contiguous(),
            result.row_max, result.log_sum, *options,
        )
        return result.loss

    with device_of(target):
        loss_masked = one_pass(logits_masked, grad_masked)
        loss_predicted = one_pass(logits_predicted, grad_predicted)
    return loss_masked, loss_predicted
