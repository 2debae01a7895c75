"""The k largest logits of every row: those of each tile, then of the row."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dmax_kernels.triton.launch import (
    NO_MASK,
    TILE,
    Mask,
    Rows,
    choose_tiles,
    next_power_of_2,
)
from dmax_kernels.triton.stats import (
    first_where,
    load_visible_tile,
    merge_sums,
    softmax_scale,
    sum_of_exponentials,
    tiles_of_program,
)

NAN_KEY = tl.constexpr(0x7FFFFFFF)
NO_KEY = tl.constexpr(-0x80000000)  # below the key of -inf: taken already, or past the end


@triton.jit
def order_key(x):
    """An int32 that orders as x does, NaN first; -0 and +0 share one key."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(x != x, NAN_KEY, key)


@triton.jit
def value_of_key(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def store_tile_topk(
    row, tile, vocab, suppress_token, allowed, scale, out_max, out_sum, out_key, out_token,
    HAS_ALLOWED: tl.constexpr, MASKED: tl.constexpr, K: tl.constexpr, TILE: tl.constexpr,
):
    ids, x = load_visible_tile(
        row, tile * TILE, vocab, suppress_token, allowed, HAS_ALLOWED, MASKED, TILE
    )
    maximum = tl.max(x, axis=0)
    tl.store(out_max + tile, maximum)
    tl.store(out_sum + tile, sum_of_exponentials(x, maximum, scale))
    key = order_key(x)
    if MASKED:
        key = tl.where(ids < vocab, key, NO_KEY)
    for i in tl.static_range(K):
        best = tl.max(key, axis=0)
        token = first_where(key == best, ids)
        tl.store(out_key + tile * K + i, best)
        tl.store(out_token + tile * K + i, token)
        key = tl.where(ids == token, NO_KEY, key)


@triton.jit(
    do_not_specialize=[
        "suppress_token", "mask_stride", "num_tiles", "tiles_per_program", "frozen_span",
    ]
)  # fmt: skip
def tile_topk_kernel(
    logits, row_stride, vocab, suppress_token, allowed, mask_stride, scale, frozen, frozen_span,
    partial_max, partial_sum, partial_key, partial_token, num_tiles, tiles_per_program,
    HAS_FROZEN: tl.constexpr, HAS_ALLOWED: tl.constexpr, K: tl.constexpr, TILE: tl.constexpr,
):
    row_id = tl.program_id(0).to(tl.int64)
    if HAS_FROZEN:  # noqa: SIM102 (the kernel language has no `and` over a constexpr and a load)
        if tl.load(frozen + row_id // frozen_span):
            return
    row = logits + row_id * row_stride
    if HAS_ALLOWED:
        allowed += row_id * mask_stride
    out_max = partial_max + row_id * num_tiles
    out_sum = partial_sum + row_id * num_tiles
    out_key = partial_key + row_id * num_tiles * K
    out_token = partial_token + row_id * num_tiles * K

    first, last, full_tiles = tiles_of_program(num_tiles, tiles_per_program, vocab, TILE)
    for tile in range(first, tl.minimum(last, full_tiles)):
        store_tile_topk(
            row, tile, vocab, suppress_token, allowed, scale,
            out_max, out_sum, out_key, out_token, HAS_ALLOWED, False, K, TILE,
        )
    if last > full_tiles:
        store_tile_topk(
            row, full_tiles, vocab, suppress_token, allowed, scale,
            out_max, out_sum, out_key, out_token, HAS_ALLOWED, True, K, TILE,
        )


@triton.jit(do_not_specialize=["num_tiles", "frozen_span"])
def topk_merge_tiles_kernel(
    partial_max, partial_sum, partial_key, partial_token, num_tiles, scale, frozen, frozen_span,
    tokens, confidences, HAS_FROZEN: tl.constexpr, K: tl.constexpr,
    TILES: tl.constexpr, CANDIDATES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if HAS_FROZEN:  # noqa: SIM102 (the kernel language has no `and` over a constexpr and a load)
        if tl.load(frozen + row // frozen_span):
            return

    # The row's normaliser, and whether it has one
    tiles = tl.arange(0, TILES)
    valid = tiles < num_tiles
    maxima = tl.load(partial_max + row * num_tiles + tiles, mask=valid, other=float("-inf"))
    sums = tl.load(partial_sum + row * num_tiles + tiles, mask=valid, other=0.0)
    best = tl.max(maxima, axis=0)
    total = merge_sums(maxima, sums, best, scale)
    broken = (tl.abs(best) == float("inf")) | (total != total)

    # The best k of all tiles' candidates
    candidates = tl.arange(0, CANDIDATES)
    at = row * num_tiles * K + candidates
    valid = candidates < num_tiles * K
    key = tl.load(partial_key + at, mask=valid, other=NO_KEY)
    token = tl.load(partial_token + at, mask=valid, other=0)
    for i in tl.static_range(K):
        best_key = tl.max(key, axis=0)
        winner = first_where(key == best_key, token)
        confidence = tl.exp2((value_of_key(best_key) - best) * scale) / total
        tl.store(tokens + row * K + i, winner.to(tl.int64))
        tl.store(confidences + row * K + i, tl.where(broken, float("nan"), confidence))
        key = tl.where(token == winner, NO_KEY, key)


def topk_of_rows(
    rows: Rows,
    k: int,
    temperature: float,
    suppress_token: int,
    frozen: Tensor | None = None,
    frozen_span: int = 1,
    mask: Mask = NO_MASK,
) -> tuple[Tensor, Tensor]:
    """(tokens, confidences), [rows, k] each; those of a frozen span stay unset."""
    device = rows.tensor.device
    tokens = torch.empty((rows.count, k), dtype=torch.int64, device=device)
    confidences = torch.empty((rows.count, k), dtype=torch.float32, device=device)
    if rows.count == 0:
        return tokens, confidences
    tiles = choose_tiles(rows.count, rows.width, device)
    scale = softmax_scale(temperature)
    statistics = [
        torch.empty((rows.count, tiles.count), dtype=torch.float32, device=device) for _ in range(2)
    ]
    candidates = [
        torch.empty((rows.count, tiles.count, k), dtype=torch.int32, device=device)
        for _ in range(2)
    ]
    tile_topk_kernel[(rows.count, tiles.programs)](
        rows.tensor, rows.stride, rows.width, suppress_token, *mask, scale, frozen, frozen_span,
        *statistics, *candidates, tiles.count, tiles.per_program,
        HAS_FROZEN=frozen is not None, HAS_ALLOWED=mask.given, K=k, TILE=TILE,
        num_warps=mask.tile_warps,
    )
    topk_merge_tiles_kernel[(rows.count,)](
        *statistics, *candidates, tiles.count, scale, frozen, frozen_span, tokens, confidences,
        HAS_FROZEN=frozen is not None, K=k, TILES=next_power_of_2(tiles.count),
        CANDIDATES=next_power_of_2(tiles.count * k), num_warps=1,
    )
    return tokens, confidences
