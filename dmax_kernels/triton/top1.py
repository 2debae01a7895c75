"""The most likely tokens and their probabilities, whole or from vocabulary shards.

A first kernel reduces each tile of the vocabulary, a second merges the tiles of a row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dmax_kernels.triton.launch import (
    NO_MASK,
    TILE,
    TILE_WARPS,
    Mask,
    Rows,
    choose_tiles,
    device_of,
    mask_of,
    next_power_of_2,
    row_view,
)
from dmax_kernels.triton.stats import (
    Partials,
    first_where,
    launch_tile_statistics,
    load_partials,
    load_visible_tile,
    merge_statistics,
    merge_sums,
    softmax_scale,
    sum_of_exponentials,
    tiles_of_program,
)


@triton.jit
def confidence_of(maximum, sum_exp):
    """softmax at the maximum is 1 / sum; NaN where the maximum is infinite."""
    return tl.where(tl.abs(maximum) == float("inf"), float("nan"), 1.0 / sum_exp)


@triton.jit(do_not_specialize=["num_tiles", "frozen_span"])
def top1_merge_tiles_kernel(
    partial_max, partial_sum, partial_token, num_tiles, scale, frozen, frozen_span,
    token, confidence, HAS_FROZEN: tl.constexpr, TILES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if HAS_FROZEN:  # noqa: SIM102 (the kernel language has no `and` over a constexpr and a load)
        if tl.load(frozen + row // frozen_span):
            return
    maxima, sums, tokens = load_partials(
        partial_max, partial_sum, partial_token, row, num_tiles, TILES
    )
    best, total, winner = merge_statistics(maxima, sums, tokens, scale)
    tl.store(token + row, winner.to(tl.int64))
    tl.store(confidence + row, confidence_of(best, total))


def top1_of_rows(
    rows: Rows,
    temperature: float,
    suppress_token: int,
    frozen: Tensor | None = None,
    frozen_span: int = 1,
    mask: Mask = NO_MASK,
) -> tuple[Tensor, Tensor]:
    """(token, confidence), [rows] each; those of a frozen span stay unset."""
    device = rows.tensor.device
    token = torch.empty(rows.count, dtype=torch.int64, device=device)
    confidence = torch.empty(rows.count, dtype=torch.float32, device=device)
    if rows.count == 0:
        return token, confidence
    scale = softmax_scale(temperature)
    partials = launch_tile_statistics(rows, suppress_token, scale, frozen, frozen_span, mask)
    merge_top1(partials, scale, token, confidence, frozen, frozen_span)
    return token, confidence


def merge_top1(
    partials: Partials,
    scale: float,
    token: Tensor,
    confidence: Tensor,
    frozen: Tensor | None = None,
    frozen_span: int = 1,
) -> None:
    top1_merge_tiles_kernel[(token.numel(),)](
        *partials, scale, frozen, frozen_span, token, confidence,
        HAS_FROZEN=frozen is not None, TILES=next_power_of_2(partials.num_tiles), num_warps=1,
    )


def top1_confidence(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    suppress_token: int = -1,
    allowed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    with device_of(logits):
        token, confidence = top1_of_rows(
            row_view(logits), temperature, suppress_token, mask=mask_of(allowed)
        )
    return token.view(logits.shape[:-1]), confidence.view(logits.shape[:-1])


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
        HAS_FROZEN=frozen is not None, HAS_ALLOWED=mask.given, K=k, TILE=TILE, num_warps=TILE_WARPS,
    )
    topk_merge_tiles_kernel[(rows.count,)](
        *statistics, *candidates, tiles.count, scale, frozen, frozen_span, tokens, confidences,
        HAS_FROZEN=frozen is not None, K=k, TILES=next_power_of_2(tiles.count),
        CANDIDATES=next_power_of_2(tiles.count * k), num_warps=1,
    )
    return tokens, confidences


def topk_confidence(
    logits: Tensor,
    k: int,
    *,
    temperature: float = 1.0,
    suppress_token: int = -1,
    allowed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    with device_of(logits):
        tokens, confidences = topk_of_rows(
            row_view(logits), k, temperature, suppress_token, mask=mask_of(allowed)
        )
    shape = (*logits.shape[:-1], k)
    return tokens.view(shape), confidences.view(shape)


@triton.jit(do_not_specialize=["num_tiles", "vocab_start"])
def partial_merge_tiles_kernel(
    partial_max, partial_sum, partial_token, num_tiles, scale, vocab_start,
    maximum, sum_exp, token, TILES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    maxima, sums, tokens = load_partials(
        partial_max, partial_sum, partial_token, row, num_tiles, TILES
    )
    best, total, winner = merge_statistics(maxima, sums, tokens, scale)
    tl.store(maximum + row, best)
    tl.store(sum_exp + row, tl.where(best == float("inf"), float("nan"), total))
    tl.store(token + row, vocab_start + winner.to(tl.int64))


def top1_partial(
    logits_shard: Tensor,
    vocab_start: int,
    *,
    temperature: float = 1.0,
    suppress_token: int = -1,
    allowed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    shape, device = logits_shard.shape[:-1], logits_shard.device
    maximum = torch.empty(shape, dtype=torch.float32, device=device)
    sum_exp = torch.empty(shape, dtype=torch.float32, device=device)
    token = torch.empty(shape, dtype=torch.int64, device=device)
    if token.numel() == 0:
        return maximum, sum_exp, token
    with device_of(logits_shard):
        rows = row_view(logits_shard)
        scale = softmax_scale(temperature)
        partials = launch_tile_statistics(
            rows, suppress_token - vocab_start, scale, mask=mask_of(allowed)
        )
        partial_merge_tiles_kernel[(rows.count,)](
            *partials, scale, vocab_start, maximum, sum_exp, token,
            TILES=next_power_of_2(partials.num_tiles), num_warps=1,
        )
    return maximum, sum_exp, token


NO_ID_64 = tl.constexpr(0x7FFFFFFFFFFFFFFF)


@triton.jit
def shard_places(row, num_shards, num_rows, SHARDS: tl.constexpr):
    """Where in [shards, rows] a row's partial results lie, and which of the places exist."""
    shards = tl.arange(0, SHARDS)
    return shards.to(tl.int64) * num_rows + row, shards < num_shards


@triton.jit
def winning_token(values, tokens):
    """(token of the largest value, whether any is NaN): NaN before all, ties lowest id."""
    best = tl.max(values, axis=0)
    winner = tl.min(tl.where(values == best, tokens, NO_ID_64), axis=0)
    nan_winner = tl.min(tl.where(values != values, tokens, NO_ID_64), axis=0)
    any_nan = nan_winner != NO_ID_64
    return tl.where(any_nan, nan_winner, winner), any_nan


@triton.jit(do_not_specialize=["num_shards"])
def top1_merge_kernel(
    maximum, sum_exp, token, num_shards, num_rows, scale, out_token, out_confidence,
    SHARDS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at, valid = shard_places(row, num_shards, num_rows, SHARDS)
    maxima = tl.load(maximum + at, mask=valid, other=float("-inf"))
    sums = tl.load(sum_exp + at, mask=valid, other=0.0)
    tokens = tl.load(token + at, mask=valid, other=NO_ID_64)

    best = tl.max(maxima, axis=0)
    winner, any_nan = winning_token(maxima, tokens)
    confidence = confidence_of(best, merge_sums(maxima, sums, best, scale))
    if any_nan:
        confidence = float("nan")
    tl.store(out_token + row, winner)
    tl.store(out_confidence + row, confidence)


def top1_merge(
    maximum: Tensor, sum_exp: Tensor, token: Tensor, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    num_shards, *shape = maximum.shape
    out_token = torch.empty(shape, dtype=torch.int64, device=maximum.device)
    out_confidence = torch.empty(shape, dtype=torch.float32, device=maximum.device)
    if out_token.numel() == 0:
        return out_token, out_confidence
    with device_of(maximum):
        top1_merge_kernel[(out_token.numel(),)](
            maximum.contiguous(), sum_exp.contiguous(), token.contiguous(),
            num_shards, out_token.numel(), softmax_scale(temperature), out_token, out_confidence,
            SHARDS=next_power_of_2(num_shards), num_warps=1,
        )
    return out_token, out_confidence
