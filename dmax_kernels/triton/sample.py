"""Samples in one read, whole or from vocabulary shards; filters are in sample_filters.py."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dmax_kernels.triton.draw import Results, greedy_results, sample_of_tiles, store_sample
from dmax_kernels.triton.launch import (
    TILE,
    Rows,
    choose_tiles,
    device_of,
    next_power_of_2,
    row_view,
)
from dmax_kernels.triton.philox import DRAW_TILE, row_key
from dmax_kernels.triton.sample_filters import DrawOptions, sample_filtered
from dmax_kernels.triton.stats import (
    NO_ID,
    finite_or_zero,
    first_where,
    load_partials,
    merge_sums,
    softmax_scale,
    tiles_of_program,
)
from dmax_kernels.triton.top1 import NO_ID_64, shard_places, top1_of_rows, winning_token

# Sixteen logits per thread: the draw needs registers beside them
SAMPLE_WARPS = 8


@triton.jit
def load_draw_tiles(row, tile, vocab, suppress_token, MASKED: tl.constexpr, N: tl.constexpr):
    """Ids and float32 logits [N, 64] of N draw tiles from `tile` on, as load_tile gives them."""
    ids = (tile + tl.arange(0, N))[:, None] * DRAW_TILE + tl.arange(0, DRAW_TILE)[None, :]
    if MASKED:
        x = tl.load(row + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
    else:
        x = tl.load(row + ids).to(tl.float32)
    first = tile * DRAW_TILE
    if (suppress_token >= first) & (suppress_token < first + N * DRAW_TILE):
        x = tl.where(ids == suppress_token, float("-inf"), x)
    return ids, x


@triton.jit
def store_tile_sample(
    row, tile, vocab, suppress_token, scale, inverse_temperature, seed, row_number, offset,
    first_tile, out_max, out_sum, out_score, out_token, MASKED: tl.constexpr, N: tl.constexpr,
):
    ids, x = load_draw_tiles(row, tile * N, vocab, suppress_token, MASKED, N)
    maximum, sum_exp, score, token = sample_of_tiles(
        x, ids, tile * N, first_tile, scale, inverse_temperature, seed, row_number, offset, N
    )
    tl.store(out_max + tile, maximum)
    tl.store(out_sum + tile, sum_exp)
    tl.store(out_score + tile, score)
    tl.store(out_token + tile, token)


@triton.jit(do_not_specialize=["suppress_token", "first_tile", "num_tiles", "tiles_per_program"])
def tile_sample_kernel(
    logits, row_stride, vocab, suppress_token, scale, inverse_temperature, seed, first_tile,
    partial_max, partial_sum, partial_score, partial_token, num_tiles, tiles_per_program,
    SEED_PER_ROW: tl.constexpr, N: tl.constexpr,
):
    row_id = tl.program_id(0).to(tl.int64)
    row = logits + row_id * row_stride
    key, offset, row_number = row_key(seed, row_id, SEED_PER_ROW)
    out_max = partial_max + row_id * num_tiles
    out_sum = partial_sum + row_id * num_tiles
    out_score = partial_score + row_id * num_tiles
    out_token = partial_token + row_id * num_tiles

    first, last, full_tiles = tiles_of_program(num_tiles, tiles_per_program, vocab, N * DRAW_TILE)
    for tile in range(first, tl.minimum(last, full_tiles)):
        store_tile_sample(
            row, tile, vocab, suppress_token, scale, inverse_temperature, key, row_number, offset,
            first_tile, out_max, out_sum, out_score, out_token, False, N,
        )
    if last > full_tiles:
        store_tile_sample(
            row, full_tiles, vocab, suppress_token, scale, inverse_temperature, key, row_number,
            offset, first_tile, out_max, out_sum, out_score, out_token, True, N,
        )


@triton.jit
def merge_samples(maximum, sum_exp, score, token, scale):
    """A row's partial results [tiles] -> (its maximum, sum of exponentials, score, sampled id)."""
    best = tl.max(maximum, axis=0)
    nan_token = first_where(maximum != maximum, token)
    best_score = tl.max(score, axis=0)
    sampled = first_where(score == best_score, token)
    # Not finite: the top-1's id; all -inf are equal scores, which the lowest id, 0, wins
    sampled = tl.where(best == float("inf"), first_where(maximum == best, token), sampled)
    sampled = tl.where(nan_token != NO_ID, nan_token, sampled)
    broken = (nan_token != NO_ID) | (tl.abs(best) == float("inf"))
    total = tl.where(broken, float("nan"), merge_sums(maximum, sum_exp, best, scale))
    return best, total, best_score, sampled


@triton.jit
def load_and_merge_samples(
    partial_max, partial_sum, partial_score, partial_token, row, num_tiles, scale,
    TILES: tl.constexpr,
):
    maxima, sums, tokens = load_partials(
        partial_max, partial_sum, partial_token, row, num_tiles, TILES
    )
    tiles = tl.arange(0, TILES)
    scores = tl.load(
        partial_score + row * num_tiles + tiles, mask=tiles < num_tiles, other=float("-inf")
    )
    return merge_samples(maxima, sums, scores, tokens, scale)


@triton.jit(do_not_specialize=["num_tiles"])
def sample_merge_tiles_kernel(
    logits, row_stride, partial_max, partial_sum, partial_score, partial_token, num_tiles, scale,
    out_token, out_probability, out_top1, out_relative, TILES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    best, total, _, token = load_and_merge_samples(
        partial_max, partial_sum, partial_score, partial_token, row, num_tiles, scale, TILES
    )
    x = tl.load(logits + row * row_stride + token).to(tl.float32)
    store_sample(
        row, token, x, best, total, scale, out_token, out_probability, out_top1, out_relative
    )


class SamplePartials(NamedTuple):
    """Statistics and best sample of every tile of every row, [rows, tiles] each."""

    maximum: Tensor
    sum_exp: Tensor
    score: Tensor
    token: Tensor
    num_tiles: int


def launch_tile_samples(
    rows: Rows,
    seed: Tensor,
    temperature: float,
    suppress_token: int,
    first_id: int = 0,
) -> SamplePartials:
    """One read of the logits, whose ids begin at first_id."""
    tiles = choose_tiles(rows.count, rows.width, rows.tensor.device)
    partials = SamplePartials(
        *(
            torch.empty((rows.count, tiles.count), dtype=dtype, device=rows.tensor.device)
            for dtype in (torch.float32, torch.float32, torch.float32, torch.int32)
        ),
        tiles.count,
    )
    tile_sample_kernel[(rows.count, tiles.programs)](
        rows.tensor, rows.stride, rows.width, suppress_token, softmax_scale(temperature),
        1.0 / temperature, seed.contiguous(), first_id // DRAW_TILE.value, *partials,
        tiles.per_program, SEED_PER_ROW=seed.dim() != 1, N=TILE // DRAW_TILE.value,
        num_warps=SAMPLE_WARPS,
    )
    return partials


def sample_rows(rows: Rows, seed: Tensor, temperature: float, suppress_token: int) -> Results:
    results = Results.empty(rows.count, rows.tensor.device)
    partials = launch_tile_samples(rows, seed, temperature, suppress_token)
    sample_merge_tiles_kernel[(rows.count,)](
        rows.tensor, rows.stride, *partials, softmax_scale(temperature), *results,
        TILES=next_power_of_2(partials.num_tiles), num_warps=1,
    )
    return results


def sample_tokens(
    logits: Tensor,
    seed: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    row_options: Tensor | None = None,
    suppress_token: int = -1,
    allowed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with device_of(logits):
        rows = row_view(logits)
        options = DrawOptions(temperature, top_k, top_p, min_p, row_options, allowed)
        if rows.count == 0:
            results = Results.empty(0, logits.device)
        elif options.needs_filters(rows.width):
            results = sample_filtered(rows, seed, options, suppress_token)
        elif temperature == 0:
            results = greedy_results(*top1_of_rows(rows, 1.0, suppress_token))
        else:
            results = sample_rows(rows, seed, temperature, suppress_token)
    return results.in_shape(logits.shape[:-1])


@triton.jit(do_not_specialize=["num_tiles", "vocab_start"])
def sample_partial_merge_tiles_kernel(
    logits, row_stride, partial_max, partial_sum, partial_score, partial_token, num_tiles, scale,
    vocab_start, out_max, out_sum, out_token, out_score, out_weight, TILES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    best, total, score, token = load_and_merge_samples(
        partial_max, partial_sum, partial_score, partial_token, row, num_tiles, scale, TILES
    )
    x = tl.load(logits + row * row_stride + token).to(tl.float32)
    weight = tl.exp2((x - best) * scale)
    if best == float("-inf"):  # no mass
        total = 0.0
        weight = 0.0
    # NaN, +inf and all -inf: the maximum says it all
    finite = tl.abs(best) < float("inf")
    tl.store(out_max + row, best)
    tl.store(out_sum + row, total)
    tl.store(out_token + row, vocab_start + token.to(tl.int64))
    tl.store(out_score + row, tl.where(finite, score, best))
    tl.store(out_weight + row, weight)


def sample_partial(
    logits_shard: Tensor,
    seed: Tensor,
    vocab_start: int,
    *,
    temperature: float = 1.0,
    suppress_token: int = -1,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    f32, i64 = torch.float32, torch.int64
    out = tuple(
        torch.empty(logits_shard.shape[:-1], dtype=dtype, device=logits_shard.device)
        for dtype in (f32, f32, i64, f32, f32)
    )
    if out[0].numel() == 0:
        return out
    with device_of(logits_shard):
        rows = row_view(logits_shard)
        partials = launch_tile_samples(
            rows, seed, temperature, suppress_token - vocab_start, vocab_start
        )
        sample_partial_merge_tiles_kernel[(rows.count,)](
            rows.tensor, rows.stride, *partials, softmax_scale(temperature), vocab_start, *out,
            TILES=next_power_of_2(partials.num_tiles), num_warps=1,
        )
    return out


@triton.jit(do_not_specialize=["num_shards"])
def sample_merge_kernel(
    maximum, sum_exp, token, score, weight, num_shards, num_rows, scale, out_token,
    out_probability, SHARDS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at, valid = shard_places(row, num_shards, num_rows, SHARDS)
    maxima = tl.load(maximum + at, mask=valid, other=float("-inf"))
    sums = tl.load(sum_exp + at, mask=valid, other=0.0)
    tokens = tl.load(token + at, mask=valid, other=NO_ID_64)
    scores = tl.load(score + at, mask=valid, other=float("-inf"))
    weights = tl.load(weight + at, mask=valid, other=0.0)

    sampled, any_nan = winning_token(scores, tokens)
    best = tl.max(maxima, axis=0)
    mass = weights * tl.exp2((maxima - finite_or_zero(best)) * scale)
    mass = tl.sum(tl.where(valid & (tokens == sampled), mass, 0.0), axis=0)
    probability = mass / merge_sums(maxima, sums, best, scale)
    if any_nan | (tl.abs(best) == float("inf")):
        probability = float("nan")
    tl.store(out_token + row, sampled)
    tl.store(out_probability + row, probability)


def sample_merge(
    maximum: Tensor,
    sum_exp: Tensor,
    token: Tensor,
    score: Tensor,
    weight: Tensor,
    *,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    num_shards, *shape = maximum.shape
    out_token = torch.empty(shape, dtype=torch.int64, device=maximum.device)
    out_probability = torch.empty(shape, dtype=torch.float32, device=maximum.device)
    if out_token.numel() == 0:
        return out_token, out_probability
    with device_of(maximum):
        sample_merge_kernel[(out_token.numel(),)](
            *(t.contiguous() for t in (maximum, sum_exp, token, score, weight)), num_shards,
            out_token.numel(), softmax_scale(temperature), out_token, out_probability,
            SHARDS=next_power_of_2(num_shards), num_warps=1,
        )
    return out_token, out_probability
