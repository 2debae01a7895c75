"""Online softmax statistics of a row, tile by tile; shared by every op that reads logits.

A row's tiles give partial results (maximum, sum of exponentials, token id), which are merged in
one fixed order. A NaN wins over everything and a +inf over the rest; ties go to the lowest id; a
-inf has no mass. The sum of exponentials doubles as the flag: it is NaN if the tile holds a NaN and
+inf if it holds a +inf, so that ordinary tiles need no extra test.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dmax_kernels.triton.launch import NO_MASK, TILE, Mask, Rows, choose_tiles

NO_ID = tl.constexpr(0x7FFFFFFF)
LOG2_E = tl.constexpr(1.4426950408889634)
LEAST_TEMPERATURE, MOST_TEMPERATURE = tl.constexpr(1e-30), tl.constexpr(1e30)


def softmax_scale(temperature: float) -> float:
    """log2(e) / temperature: one multiplication per logit gives the exponent of exp2."""
    return LOG2_E.value / temperature


@triton.jit
def quotient(dividend: tl.constexpr, divisor):
    """In double and then rounded, as the host divides: the same bits."""
    return (tl.full([], dividend, tl.float64) / divisor.to(tl.float64)).to(tl.float32)


@triton.jit
def row_temperature(temperatures, row):
    """NaN where it is out of range."""
    temperature = tl.load(temperatures + row)
    valid = (temperature >= LEAST_TEMPERATURE) & (temperature <= MOST_TEMPERATURE)
    return tl.where(valid, temperature, float("nan"))


@triton.jit
def row_scale(temperatures, row, scale, HAS_TEMPERATURES: tl.constexpr):
    """softmax_scale() of each row's temperature; NaN where that is out of range."""
    if HAS_TEMPERATURES:
        return quotient(LOG2_E, row_temperature(temperatures, row))
    return scale + row.to(tl.float32) * 0.0


@triton.jit
def load_tile(row, start, vocab, suppress_token, MASKED: tl.constexpr, TILE: tl.constexpr):
    """Ids and float32 logits of one tile, -inf at the suppressed id and past the end."""
    ids = start + tl.arange(0, TILE)
    if MASKED:
        x = tl.load(row + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
    else:
        x = tl.load(row + ids).to(tl.float32)
    # Only the one tile that holds it pays for the comparisons
    if (suppress_token >= start) & (suppress_token < start + TILE):
        x = tl.where(ids == suppress_token, float("-inf"), x)
    return ids, x


@triton.jit
def load_visible_tile(
    row, start, vocab, suppress_token, allowed, HAS_ALLOWED: tl.constexpr, MASKED: tl.constexpr,
    TILE: tl.constexpr,
):
    """load_tile() with -inf where the row's mask does not allow the id, too. A tile of which
    nothing is allowed is not read.
    """
    if HAS_ALLOWED:
        ids = start + tl.arange(0, TILE)
        words = tl.load(allowed + ids // 32, mask=ids < vocab, other=0)
        visible = ((words >> (ids % 32)) & 1) != 0
        x = tl.full([TILE], float("-inf"), tl.float32)
        if tl.max(visible.to(tl.int32), axis=0) > 0:
            _, x = load_tile(row, start, vocab, suppress_token, MASKED, TILE)
            x = tl.where(visible, x, float("-inf"))
    else:
        ids, x = load_tile(row, start, vocab, suppress_token, MASKED, TILE)
    return ids, x


@triton.jit
def finite_or_zero(maximum):
    """What exponents are taken relative to: inf - inf would be NaN in a row without a NaN."""
    return tl.where(tl.abs(maximum) == float("inf"), 0.0, maximum)


@triton.jit
def sum_of_exponentials(x, maximum, scale):
    # Subtracting before scaling keeps full precision under an offset common to all logits
    return tl.sum(tl.exp2((x - finite_or_zero(maximum)) * scale), axis=0)


@triton.jit
def merge_sums(maximum, sum_exp, best, scale):
    """Tiles' sums of exponentials, each relative to its maximum -> the row's, relative to best."""
    return tl.sum(sum_exp * tl.exp2((maximum - finite_or_zero(best)) * scale), axis=0)


@triton.jit
def first_where(condition, ids):
    """Lowest id at which the condition holds, NO_ID if there is none."""
    return tl.min(tl.where(condition, ids, NO_ID), axis=0)


@triton.jit
def tile_statistics(x, ids, scale):
    """(maximum, sum of exponentials, lowest id of the maximum) of one tile."""
    maximum = tl.max(x, axis=0)
    sum_exp = sum_of_exponentials(x, maximum, scale)
    token = first_where(x == maximum, ids)
    if sum_exp != sum_exp:
        nan_token = first_where(x != x, ids)
        if nan_token != NO_ID:
            token = nan_token
            maximum = float("nan")
    return maximum, sum_exp, token


@triton.jit
def merge_statistics(maximum, sum_exp, token, scale):
    """A row's partial results [tiles], padded with (-inf, 0, NO_ID) -> those of the row."""
    best = tl.max(maximum, axis=0)
    winner = first_where(maximum == best, token)
    nan_token = first_where(maximum != maximum, token)
    total = merge_sums(maximum, sum_exp, best, scale)
    if nan_token != NO_ID:
        winner = nan_token
        best = float("nan")
    return best, total, winner


@triton.jit
def load_partials(partial_max, partial_sum, partial_token, row, num_tiles, TILES: tl.constexpr):
    tiles = tl.arange(0, TILES)
    at = row * num_tiles + tiles
    valid = tiles < num_tiles
    return (
        tl.load(partial_max + at, mask=valid, other=float("-inf")),
        tl.load(partial_sum + at, mask=valid, other=0.0),
        tl.load(partial_token + at, mask=valid, other=NO_ID),
    )


@triton.jit
def tiles_of_program(num_tiles, tiles_per_program, vocab, TILE: tl.constexpr):
    """(first, last, full_tiles): this program's tiles, and the number of those that V does not cut.

    A loop takes the tiles before full_tiles without a mask, and the cut one follows with one: a
    mask in the loop would rule out 16-byte loads where V is not a multiple of 8.
    """
    first = tl.program_id(1) * tiles_per_program
    last = tl.minimum(first + tiles_per_program, num_tiles)
    return first, last, vocab // TILE


@triton.jit
def store_tile_statistics(
    row, tile, vocab, suppress_token, allowed, scale, out_max, out_sum, out_token,
    HAS_ALLOWED: tl.constexpr, MASKED: tl.constexpr, TILE: tl.constexpr,
):
    ids, x = load_visible_tile(
        row, tile * TILE, vocab, suppress_token, allowed, HAS_ALLOWED, MASKED, TILE
    )
    maximum, sum_exp, token = tile_statistics(x, ids, scale)
    tl.store(out_max + tile, maximum)
    tl.store(out_sum + tile, sum_exp)
    tl.store(out_token + tile, token)


# These change between calls and must not compile the kernel again
@triton.jit(
    do_not_specialize=[
        "suppress_token", "mask_stride", "num_tiles", "tiles_per_program", "frozen_span",
    ]
)  # fmt: skip
def tile_statistics_kernel(
    logits,
    row_stride,
    vocab,
    suppress_token,
    allowed,  # int32, mask_stride words from a row to the next (HAS_ALLOWED)
    mask_stride,
    scale,
    frozen,  # bool, one per frozen_span rows: their logits are not read (HAS_FROZEN)
    frozen_span,
    partial_max,
    partial_sum,
    partial_token,
    num_tiles,
    tiles_per_program,
    HAS_FROZEN: tl.constexpr,
    HAS_ALLOWED: tl.constexpr,
    TILE: tl.constexpr,
):
    row_id = tl.program_id(0).to(tl.int64)  # int32 overflows at row 13,663 of V = 157,184
    if HAS_FROZEN:  # noqa: SIM102 (the kernel language has no `and` over a constexpr and a load)
        if tl.load(frozen + row_id // frozen_span):
            return
    row = logits + row_id * row_stride
    if HAS_ALLOWED:
        allowed += row_id * mask_stride
    out_max = partial_max + row_id * num_tiles
    out_sum = partial_sum + row_id * num_tiles
    out_token = partial_token + row_id * num_tiles

    first, last, full_tiles = tiles_of_program(num_tiles, tiles_per_program, vocab, TILE)
    for tile in range(first, tl.minimum(last, full_tiles)):
        store_tile_statistics(
            row, tile, vocab, suppress_token, allowed, scale, out_max, out_sum, out_token,
            HAS_ALLOWED, False, TILE,
        )
    if last > full_tiles:
        store_tile_statistics(
            row, full_tiles, vocab, suppress_token, allowed, scale, out_max, out_sum, out_token,
            HAS_ALLOWED, True, TILE,
        )


class Partials(NamedTuple):
    """Statistics of every tile of every row, [rows, tiles] each."""

    maximum: Tensor
    sum_exp: Tensor
    token: Tensor
    num_tiles: int


def launch_tile_statistics(
    rows: Rows,
    suppress_token: int,
    scale: float,
    frozen: Tensor | None = None,
    frozen_span: int = 1,
    mask: Mask = NO_MASK,
) -> Partials:
    """One read of the logits; rows of a frozen span are skipped, and their partials stay unset."""
    tiles = choose_tiles(rows.count, rows.width, rows.tensor.device)
    # One allocation each: their alignment, and with it the kernel, is the same for any row count
    partials = Partials(
        *(
            torch.empty((rows.count, tiles.count), dtype=dtype, device=rows.tensor.device)
            for dtype in (torch.float32, torch.float32, torch.int32)
        ),
        tiles.count,
    )
    tile_statistics_kernel[(rows.count, tiles.programs)](
        rows.tensor, rows.stride, rows.width, suppress_token, *mask, scale,
        frozen, frozen_span, *partials, tiles.per_program,
        HAS_FROZEN=frozen is not None, HAS_ALLOWED=mask.given, TILE=TILE, num_warps=mask.tile_warps,
    )
    return partials
