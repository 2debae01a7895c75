"""Top-1, runner-up, entropy and logsumexp: tiles' statistics, then one merge per row."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dmax_kernels.triton.launch import (
    TILE,
    choose_tiles,
    device_of,
    mask_of,
    next_power_of_2,
    row_view,
)
from dmax_kernels.triton.stats import (
    finite_or_zero,
    load_partials,
    load_visible_tile,
    merge_statistics,
    quotient,
    row_scale,
    row_temperature,
    softmax_scale,
    tile_statistics,
    tiles_of_program,
)
from dmax_kernels.triton.top1 import confidence_of

LOG_2 = tl.constexpr(0.6931471805599453)
# Below this, 2^t underflows to 0. Clamping t here makes t * 2^t 0 too, instead of -inf * 0 = NaN
LEAST_EXPONENT = tl.constexpr(-150.0)


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0; the quotient undoes the rounding of 1 + x."""
    u = 1.0 + x
    lost = tl.where(u == 1.0, 1.0, x / tl.where(u == 1.0, 1.0, u - 1.0))
    return tl.where(u == 1.0, x, tl.log(u) * lost)


@triton.jit
def store_tile(
    row, tile, vocab, suppress_token, allowed, scale, out_max, out_sum, out_token, out_rest,
    out_exponent, out_second, HAS_ALLOWED: tl.constexpr, MASKED: tl.constexpr, TILE: tl.constexpr,
):
    ids, x = load_visible_tile(
        row, tile * TILE, vocab, suppress_token, allowed, HAS_ALLOWED, MASKED, TILE
    )
    maximum, sum_exp, token = tile_statistics(x, ids, scale)
    tl.store(out_max + tile, maximum)
    tl.store(out_sum + tile, sum_exp)
    tl.store(out_token + tile, token)
    # Without the winner: beside its 1 the entropy of a sure row would lose its digits
    exponent = (x - finite_or_zero(maximum)) * scale
    weight = tl.where(ids == token, 0.0, tl.exp2(exponent))
    bounded = tl.where(exponent > LEAST_EXPONENT, exponent, LEAST_EXPONENT)
    tl.store(out_rest + tile, tl.sum(weight, axis=0))
    tl.store(out_exponent + tile, tl.sum(bounded * weight, axis=0))
    tl.store(out_second + tile, tl.max(tl.where(ids == token, float("-inf"), x), axis=0))


@triton.jit(
    do_not_specialize=["suppress_token", "mask_stride", "num_tiles", "tiles_per_program"]
)
def tile_entropy_kernel(
    logits, row_stride, vocab, suppress_token, allowed, mask_stride, scale, temperatures,
    partial_max, partial_sum, partial_token, partial_rest, partial_exponent, partial_second,
    num_tiles, tiles_per_program, HAS_ALLOWED: tl.constexpr, HAS_TEMPERATURES: tl.constexpr,
    TILE: tl.constexpr,
):
    row_id = tl.program_id(0).to(tl.int64)
    row = logits + row_id * row_stride
    if HAS_TEMPERATURES:
        scale = row_scale(temperatures, row_id, scale, True)
    if HAS_ALLOWED:
        allowed += row_id * mask_stride
    out_max = partial_max + row_id * num_tiles
    out_sum = partial_sum + row_id * num_tiles
    out_token = partial_token + row_id * num_tiles
    out_rest = partial_rest + row_id * num_tiles
    out_exponent = partial_exponent + row_id * num_tiles
    out_second = partial_second + row_id * num_tiles

    first, last, full_tiles = tiles_of_program(num_tiles, tiles_per_program, vocab, TILE)
    for tile in range(first, tl.minimum(last, full_tiles)):
        store_tile(
            row, tile, vocab, suppress_token, allowed, scale, out_max, out_sum, out_token, out_rest,
            out_exponent, out_second, HAS_ALLOWED, False, TILE,
        )
    if last > full_tiles:
        store_tile(
            row, full_tiles, vocab, suppress_token, allowed, scale, out_max, out_sum, out_token,
            out_rest, out_exponent, out_second, HAS_ALLOWED, True, TILE,
        )


@triton.jit(do_not_specialize=["num_tiles"])
def entropy_merge_tiles_kernel(
    partial_max, partial_sum, partial_token, partial_rest, partial_exponent, partial_second,
    num_tiles, scale, inverse_temperature, temperatures, token, confidence, runner_up, entropy,
    logsumexp, HAS_TEMPERATURES: tl.constexpr, TILES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if HAS_TEMPERATURES:
        scale = row_scale(temperatures, row, scale, True)
        inverse_temperature = quotient(1.0, row_temperature(temperatures, row))
    maxima, sums, tokens = load_partials(
        partial_max, partial_sum, partial_token, row, num_tiles, TILES
    )
    best, total, winner = merge_statistics(maxima, sums, tokens, scale)
    top = confidence_of(best, total)
    broken = top != top

    tiles = tl.arange(0, TILES)
    at = row * num_tiles + tiles
    valid = tiles < num_tiles
    rests = tl.load(partial_rest + at, mask=valid, other=0.0)
    exponents = tl.load(partial_exponent + at, mask=valid, other=0.0)
    seconds = tl.load(partial_second + at, mask=valid, other=float("-inf"))

    # Relative to the row's maximum, all exponents of a tile are lower by the tile's shift
    shift = (maxima - finite_or_zero(best)) * scale
    weight = tl.exp2(shift)
    bounded = tl.where(shift > LEAST_EXPONENT, shift, LEAST_EXPONENT)
    holds_winner = tokens == winner
    rest = tl.sum(tl.where(holds_winner, rests, sums * weight), axis=0)
    exponent = tl.sum((exponents + bounded * sums) * weight, axis=0)
    second = tl.max(tl.where(holds_winner, seconds, maxima), axis=0)

    log_sum = log1p(rest)
    if HAS_TEMPERATURES:  # out of range: scale is NaN, and with it the sums
        winner = tl.where(scale == scale, winner, 0)
        best = tl.where(scale == scale, best, float("nan"))
    second_weight = tl.exp2((second - finite_or_zero(best)) * scale)
    tl.store(token + row, winner.to(tl.int64))
    tl.store(confidence + row, top)
    tl.store(runner_up + row, tl.where(broken, float("nan"), second_weight * top))
    tl.store(entropy + row, tl.where(broken, float("nan"), log_sum - LOG_2 * exponent * top))
    tl.store(logsumexp + row, tl.where(broken, best, best * inverse_temperature + log_sum))


def row_statistics(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    temperatures: Tensor | None = None,
    suppress_token: int = -1,
    allowed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    shape, device = logits.shape[:-1], logits.device
    token = torch.empty(shape, dtype=torch.int64, device=device)
    others = [torch.empty(shape, dtype=torch.float32, device=device) for _ in range(4)]
    if token.numel() == 0:
        return token, *others
    with device_of(logits):
        rows, mask = row_view(logits), mask_of(allowed)
        scale, given = softmax_scale(temperature), temperatures is not None
        if given:
            temperatures = temperatures.contiguous()
        tiles = choose_tiles(rows.count, rows.width, device)
        f32, i32 = torch.float32, torch.int32
        partials = [
            torch.empty((rows.count, tiles.count), dtype=dtype, device=device)
            for dtype in (f32, f32, i32, f32, f32, f32)
        ]
        tile_entropy_kernel[(rows.count, tiles.programs)](
            rows.tensor, rows.stride, rows.width, suppress_token, *mask, scale, temperatures,
            *partials, tiles.count, tiles.per_program, HAS_ALLOWED=mask.given,
            HAS_TEMPERATURES=given, TILE=TILE, num_warps=mask.tile_warps,
        )
        entropy_merge_tiles_kernel[(rows.count,)](
            *partials, tiles.count, scale, 1.0 / temperature, temperatures, token, *others,
            HAS_TEMPERATURES=given, TILES=next_power_of_2(tiles.count), num_warps=1,
        )
    return token, *others
