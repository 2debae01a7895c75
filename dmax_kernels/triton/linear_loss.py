"""oput_loss of hidden @ weight^T + bias without stored logits. Gradients: linear_gradients.py."""

import contextlib
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from dmax_kernels.triton.launch import device_of, next_power_of_2, row_view
from dmax_kernels.triton.linear_rows import any_of, choose_linear_tiles, logits_tile, precision_of
from dmax_kernels.triton.loss import loss_of_row, merge_log_sums
from dmax_kernels.triton.stats import finite_or_zero, softmax_scale


@triton.jit(do_not_specialize=["num_rows", "blocks_per_pass", "ignore_index", "num_groups",
                               "tiles_per_program"])
def linear_loss_partials_kernel(
    hidden_masked, masked_stride, hidden_predicted, predicted_stride, weight, weight_stride, bias,
    target, num_rows, blocks_per_pass, vocab, dim, ignore_index, scale,
    partial_max, partial_sum, partial_total, target_logit, num_groups, tiles_per_program,
    PRECISION: tl.constexpr, EVEN_K: tl.constexpr, HAS_BIAS: tl.constexpr, SMOOTHED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """Blocks of the masked pass, then of the predicted one, which share each weight tile in L2."""
    block = tl.program_id(0)
    group = tl.program_id(1)
    predicted = block >= blocks_per_pass
    hidden = tl.where(predicted, hidden_predicted, hidden_masked)
    hidden_stride = tl.where(predicted, predicted_stride, masked_stride)
    block -= tl.where(predicted, blocks_per_pass, 0)
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    safe_row = tl.minimum(row, num_rows - 1).to(tl.int64)
    target_ids = tl.load(target + safe_row).to(tl.int64)
    if not any_of(target_ids != ignore_index):
        return
    hidden_rows = hidden + safe_row * hidden_stride

    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    sum_exp = tl.zeros([BLOCK_M], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    logit_of_target = tl.zeros([BLOCK_M], tl.float32)
    first_tile = group * tiles_per_program
    last_tile = tl.minimum(first_tile + tiles_per_program, tl.cdiv(vocab, BLOCK_N))
    for tile in range(first_tile, last_tile):
        first = tile * BLOCK_N
        ids, x = logits_tile(
            hidden_rows, weight, weight_stride, bias, first, vocab, dim, -1,
            PRECISION, EVEN_K, HAS_BIAS, BLOCK_M, BLOCK_N, BLOCK_K,
        )
        new_max = tl.maximum(maximum, tl.max(x, axis=1))
        reference = finite_or_zero(new_max)
        tile_sum = tl.sum(tl.exp2((x - reference[:, None]) * scale), axis=1)
        sum_exp = sum_exp * tl.exp2((maximum - reference) * scale) + tile_sum
        maximum = new_max
        if SMOOTHED:
            total += tl.sum(tl.where((ids < vocab)[None, :], x, 0.0), axis=1)
        # Most tiles hold no row's target
        here = (target_ids >= first) & (target_ids < first + BLOCK_N)
        if any_of(here):
            logit_of_target += tl.sum(tl.where(ids[None, :] == target_ids[:, None], x, 0.0), axis=1)

    valid = row < num_rows
    stacked = safe_row + tl.where(predicted, num_rows, 0)
    at = stacked * num_groups + group
    tl.store(partial_max + at, maximum, mask=valid)
    tl.store(partial_sum + at, sum_exp, mask=valid)
    if SMOOTHED:
        tl.store(partial_total + at, total, mask=valid)
    mine = (target_ids >= first_tile * BLOCK_N) & (target_ids < last_tile * BLOCK_N)
    tl.store(target_logit + stacked, logit_of_target, mask=valid & mine)


@triton.jit(do_not_specialize=["first_row", "ignore_index", "num_groups"])
def linear_loss_kernel(
    target, first_row, vocab, ignore_index, scale, inverse_temperature, label_smoothing, z_loss,
    partial_max, partial_sum, partial_total, target_logit, num_groups, loss, logsumexp,
    SMOOTHED: tl.constexpr, GROUPS: tl.constexpr,
):
    """The loss of one pass, whose partial results begin at first_row of those of both passes."""
    row = tl.program_id(0).to(tl.int64)
    target_id = tl.load(target + row).to(tl.int64)
    if target_id == ignore_index:
        tl.store(loss + row, 0.0)
        tl.store(logsumexp + row, 0.0)
        return

    # Merge the groups in one order: logsumexp = maximum / temperature + log(sum of exponentials)
    groups = tl.arange(0, GROUPS)
    valid = groups < num_groups
    at = (first_row + row) * num_groups + groups
    maxima = tl.load(partial_max + at, mask=valid, other=float("-inf"))
    sums = tl.load(partial_sum + at, mask=valid, other=0.0)
    best, log_sum = merge_log_sums(maxima, sums, scale)

    # A target outside the vocabulary has no logit and makes this row's loss NaN
    known = (target_id >= 0) & (target_id < vocab)
    x = tl.load(target_logit + first_row + row, mask=known, other=float("nan"))
    mean_below = 0.0
    if SMOOTHED:
        totals = tl.load(partial_total + at, mask=valid, other=0.0)
        mean_below = best - tl.sum(totals, axis=0) / vocab
    value, lse = loss_of_row(
        best, log_sum, x, mean_below, inverse_temperature, label_smoothing, z_loss, SMOOTHED
    )
    tl.store(loss + row, tl.where(known, value, float("nan")))
    tl.store(logsumexp + row, lse)


@contextlib.contextmanager
def plain_products(t: Tensor) -> Iterator[None]:
    """On t's device, and without autocast, which would take a float32 product to 16 bits."""
    with device_of(t), torch.autocast(t.device.type, enabled=False):
        yield


def linear_oput_loss(
    hidden_masked: Tensor | None,
    hidden_predicted: Tensor | None,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    vocab, scale = weight.shape[0], softmax_scale(temperature)
    device, num_rows = weight.device, target.numel()

    def float32(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    hidden = (hidden_masked, hidden_predicted)
    losses = [float32(0) if h is None else float32(*target.shape) for h in hidden]
    logsumexps = [torch.empty_like(loss) for loss in losses]
    if num_rows == 0:
        return *losses, *logsumexps
    present = [i for i, h in enumerate(hidden) if h is not None]
    rows = [row_view(hidden[i]) for i in present]
    weight_rows = row_view(weight)
    bias = None if bias is None else bias.contiguous()
    target = target.contiguous()
    smoothed = label_smoothing > 0
    total_rows = len(present) * num_rows
    tiles = choose_linear_tiles(total_rows, vocab, weight.dtype, device)
    num_groups = -(-vocab // (tiles.block_n * tiles.tiles_per_program))
    partials = [float32(len(present), num_rows, num_groups) for _ in range(2 + smoothed)]
    if not smoothed:
        partials.append(partials[0])  # never read or written
    partials.append(float32(len(present), num_rows))  # the targets' logits
    blocks = -(-num_rows // tiles.block_m)
    first, last = rows[0], rows[-1]
    with device_of(weight):
        linear_loss_partials_kernel[(blocks * len(present), num_groups)](
            first.tensor, first.stride, last.tensor, last.stride,
            weight_rows.tensor, weight_rows.stride, bias, target, num_rows, blocks, vocab,
            first.width, ignore_index, scale, *partials, num_groups, tiles.tiles_per_program,
            PRECISION=precision_of(weight.dtype), EVEN_K=first.width % tiles.block_k == 0,
            HAS_BIAS=bias is not None, SMOOTHED=smoothed,
            BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_K=tiles.block_k,
            num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        )
        for place, i in enumerate(present):
            linear_loss_kernel[(num_rows,)](
                target, place * num_rows, vocab, ignore_index, scale, 1.0 / temperature,
                float(label_smoothing), float(z_loss), *partials, num_groups, losses[i],
                logsumexps[i],
                SMOOTHED=smoothed, GROUPS=next_power_of_2(num_groups), num_warps=1,
            )
    return *losses, *logsumexps
