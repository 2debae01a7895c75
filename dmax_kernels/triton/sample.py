"""Gumbel-max sampling in one read, with noise keyed by (seed, offset, row, id)."""

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
from dmax_kernels.triton.philox import gumbel_noise, row_key
from dmax_kernels.triton.stats import (
    NO_ID,
    first_where,
    load_partials,
    load_tile,
    merge_sums,
    softmax_scale,
    tile_statistics,
)
from dmax_kernels.triton.top1 import top1_of_rows


@triton.jit
def tile_sample(x, ids, sum_exp, token, inverse_temperature, noise):
    """(score, id) of a tile's best perturbed logit; a NaN's or +inf's id passes through."""
    score = x * inverse_temperature + noise
    best = tl.max(score, axis=0)
    sampled = first_where(score == best, ids)
    return best, tl.where(sum_exp < float("inf"), sampled, token)


@triton.jit
def store_tile_sample(
    row, tile, vocab, suppress_token, scale, inverse_temperature, seed, row_number, offset,
    first_group, out_max, out_sum, out_score, out_token, MASKED: tl.constexpr, TILE: tl.constexpr,
    SHIFT: tl.constexpr,
):  # fmt: skip
    ids, x = load_tile(row, tile * TILE, vocab, suppress_token, MASKED, TILE)
    maximum, sum_exp, token = tile_statistics(x, ids, scale)
    noise = gumbel_noise(seed, row_number, offset, tile, TILE, first_group, SHIFT)
    score, token = tile_sample(x, ids, sum_exp, token, inverse_temperature, noise)
    tl.store(out_max + tile, maximum)
    tl.store(out_sum + tile, sum_exp)
    tl.store(out_score + tile, score)
    tl.store(out_token + tile, token)


@triton.jit(do_not_specialize=["suppress_token", "first_group", "num_tiles", "tiles_per_program"])
def tile_sample_kernel(
    logits, row_stride, vocab, suppress_token, scale, inverse_temperature, seed, first_group,
    partial_max, partial_sum, partial_score, partial_token, num_tiles, tiles_per_program,
    SEED_PER_ROW: tl.constexpr, TILE: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    row_id = tl.program_id(0).to(tl.int64)
    row = logits + row_id * row_stride
    key, offset, row_number = row_key(seed, row_id, SEED_PER_ROW)
    out_max = partial_max + row_id * num_tiles
    out_sum = partial_sum + row_id * num_tiles
    out_score = partial_score + row_id * num_tiles
    out_token = partial_token + row_id * num_tiles

    first = tl.program_id(1) * tiles_per_program
    last = tl.minimum(first + tiles_per_program, num_tiles)
    full_tiles = vocab // TILE
    for tile in range(first, tl.minimum(last, full_tiles)):
        store_tile_sample(
            row, tile, vocab, suppress_token, scale, inverse_temperature, key, row_number, offset,
            first_group, out_max, out_sum, out_score, out_token, False, TILE, SHIFT,
        )  # fmt: skip
    if last > full_tiles:
        store_tile_sample(
            row, full_tiles, vocab, suppress_token, scale, inverse_temperature, key, row_number,
            offset, first_group, out_max, out_sum, out_score, out_token, True, TILE, SHIFT,
        )  # fmt: skip


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
):  # fmt: skip
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
    out_token, out_probability, TILES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    best, total, _, token = load_and_merge_samples(
        partial_max, partial_sum, partial_score, partial_token, row, num_tiles, scale, TILES
    )
    x = tl.load(logits + row * row_stride + token).to(tl.float32)
    tl.store(out_token + row, token.to(tl.int64))
    tl.store(out_probability + row, tl.exp2((x - best) * scale) / total)


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
        1.0 / temperature, seed.contiguous(), first_id // 4, *partials, tiles.per_program,
        SEED_PER_ROW=seed.dim() != 1, TILE=TILE, SHIFT=first_id % 4, num_warps=TILE_WARPS,
    )  # fmt: skip
    return partials


def sample_rows(
    rows: Rows, seed: Tensor, temperature: float, suppress_token: int
) -> tuple[Tensor, Tensor]:
    device = rows.tensor.device
    token = torch.empty(rows.count, dtype=torch.int64, device=device)
    probability = torch.empty(rows.count, dtype=torch.float32, device=device)
    if rows.count == 0:
        return token, probability
    partials = launch_tile_samples(rows, seed, temperature, suppress_token)
    sample_merge_tiles_kernel[(rows.count,)](
        rows.tensor, rows.stride, *partials, softmax_scale(temperature), token, probability,
        TILES=next_power_of_2(partials.num_tiles), num_warps=1,
    )  # fmt: skip
    return token, probability


def sample_tokens(
    logits: Tensor, seed: Tensor, *, temperature: float = 1.0, suppress_token: int = -1
) -> tuple[Tensor, Tensor]:
    with device_of(logits):
        rows = row_view(logits)
        if temperature == 0:
            token, probability = top1_of_rows(rows, 1.0, suppress_token)
        else:
            token, probability = sample_rows(rows, seed, temperature, suppress_token)
    return token.view(logits.shape[:-1]), probability.view(logits.shape[:-1])
