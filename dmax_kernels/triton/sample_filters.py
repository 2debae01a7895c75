"""sample_tokens with top_k, top_p, min_p, a mask of allowed ids, or options per row.

A first kernel reads every row once and stores the maximum and the sum of exponentials of each draw
tile (64 ids). In the second, one program per row finds the cut: the last token that the filters
keep, in the order of the logits (descending, equal ones by id), of which every filter keeps a
prefix. It bisects the values that occur. Each step counts tokens and adds up masses in those tiles
alone whose maximum reaches the value in question: few on a peaked row.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dmax_kernels.triton.draw import Results, best_of, draw_in_tile, draw_tiles
from dmax_kernels.triton.filter_search import (
    LOWEST_KEY,
    broken_token,
    cut_of,
    id_of_tie,
    kept_mass,
    kept_of,
    load_stats,
    load_visible,
    row_mass,
    ties_at,
    weights,
)
from dmax_kernels.triton.launch import Rows, next_power_of_2
from dmax_kernels.triton.philox import DRAW_TILE, row_key, tile_noise
from dmax_kernels.triton.stats import LOG2_E, NO_ID
from dmax_kernels.triton.topk import order_key, value_of_key

READ_TILES = 64  # draw tiles per step of a program: as many logits as one tile elsewhere
READ_WARPS = 4
ROW_WARPS = 8


class DrawOptions(NamedTuple):
    """The filters of a call, or of each of its rows, and the ids that it may draw."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    row_options: Tensor | None = None  # [..., 4]
    allowed: Tensor | None = None  # [..., words], one row for all or one per row

    def needs_filters(self, vocab: int) -> bool:
        """Whether a row may need more than a draw from all its ids, or than their maximum."""
        filters = 0 < self.top_k < vocab or self.top_p < 1 or self.min_p > 0
        given = self.row_options is not None or self.allowed is not None
        return given or (filters and self.temperature != 0)

    def in_rows(self) -> "DrawOptions":
        """The tensors with one leading dimension; a mask for all rows stays one row."""
        options, allowed = self.row_options, self.allowed
        return self._replace(
            row_options=None if options is None else options.reshape(-1, 4),
            allowed=None if allowed is None else allowed.reshape(-1, allowed.shape[-1]),
        )

    def span(self, rows: slice) -> "DrawOptions":
        """Those of some rows; needs the form of in_rows()."""
        options, allowed = self.row_options, self.allowed
        return self._replace(
            row_options=None if options is None else options[rows],
            allowed=allowed if allowed is None or len(allowed) == 1 else allowed[rows],
        )


@triton.jit
def options_of(row_options, row, temperature, top_k, top_p, min_p, HAS_OPTIONS: tl.constexpr):
    """(temperature, top_k, top_p, min_p, whether they are in range) of a row, float32."""
    t = tl.zeros([], tl.float32) + temperature
    k = tl.zeros([], tl.float32) + top_k
    p = tl.zeros([], tl.float32) + top_p
    m = tl.zeros([], tl.float32) + min_p
    if HAS_OPTIONS:
        t = tl.load(row_options + row * 4)
        k = tl.load(row_options + row * 4 + 1)
        p = tl.load(row_options + row * 4 + 2)
        m = tl.load(row_options + row * 4 + 3)
    valid = (t == 0) | ((t >= 1e-30) & (t <= 1e30))
    # An infinite top_k is a whole number, too
    valid &= (k >= 0) & ((k >= 2147483648.0) | (k == tl.floor(k)))
    valid &= (p > 0) & (p <= 1) & (m >= 0) & (m <= 1)
    return t, k, p, m, valid


@triton.jit(do_not_specialize=["top_k", "suppress_token", "num_tiles"])
def draw_tiles_kernel(
    logits, row_stride, vocab, suppress_token, temperature, row_options, allowed, allowed_stride,
    tile_max, tile_sum, num_tiles, HAS_OPTIONS: tl.constexpr, HAS_ALLOWED: tl.constexpr,
    N: tl.constexpr,
):
    row_id = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1) * N + tl.arange(0, N)
    t, _, _, _, valid = options_of(row_options, row_id, temperature, 0, 1.0, 0.0, HAS_OPTIONS)
    t = tl.where(valid & (t > 0), t, 1.0)
    _, x = load_visible(
        logits + row_id * row_stride, tile, tile < num_tiles, vocab, suppress_token,
        allowed + row_id * allowed_stride, HAS_ALLOWED,
    )
    maxima, sums, _ = draw_tiles(x, tl.full([], LOG2_E, tl.float32) / t, 1.0)
    inside = tile < num_tiles
    tl.store(tile_max + row_id * num_tiles + tile, maxima, mask=inside)
    tl.store(tile_sum + row_id * num_tiles + tile, sums, mask=inside)


@triton.jit(do_not_specialize=["first_row", "top_k", "suppress_token", "num_tiles"])
def sample_filtered_kernel(
    logits, row_stride, vocab, suppress_token, temperature, top_k, top_p, min_p, row_options,
    allowed, allowed_stride, seed, first_row, tile_max, tile_sum, num_tiles,
    out_token, out_probability, out_top1, out_relative,
    HAS_OPTIONS: tl.constexpr, HAS_ALLOWED: tl.constexpr, SEED_PER_ROW: tl.constexpr,
    N: tl.constexpr, STATS: tl.constexpr,
):
    row_id = tl.program_id(0).to(tl.int64)
    row = logits + row_id * row_stride
    allowed += row_id * allowed_stride
    tile_max += row_id * num_tiles
    tile_sum += row_id * num_tiles
    t, k, p, m, valid = options_of(
        row_options, row_id, temperature, top_k, top_p, min_p, HAS_OPTIONS
    )
    greedy = t == 0
    t = tl.where(valid & (t > 0), t, 1.0)
    scale = tl.full([], LOG2_E, tl.float32) / t
    inverse_temperature = 1.0 / t

    maximum, total, any_broken = row_mass(tile_max, tile_sum, num_tiles, scale, STATS)
    token = tl.zeros([], tl.int32)
    value = maximum
    kept_total = total
    defined = valid & (any_broken == 0) & (maximum > float("-inf"))
    if valid & (any_broken > 0):
        token = broken_token(
            row, vocab, suppress_token, allowed, tile_max, tile_sum, num_tiles, HAS_ALLOWED, N
        )
    if defined & greedy:
        token = id_of_tie(
            row, vocab, suppress_token, allowed, tile_max, tile_sum, num_tiles,
            order_key(maximum), 1, HAS_ALLOWED, N,
        )
    if defined & (t > 0) & (greedy == 0):
        key = tl.zeros([], tl.int32) + LOWEST_KEY
        last_id = tl.zeros([], tl.int32) + NO_ID
        for filter in range(2):  # top_k, then top_p
            by_mass = filter == 1
            if tl.where(by_mass, p < 1, (k > 0) & (k < vocab)):
                target = k.to(tl.float64)
                if by_mass:  # a part of what top_k keeps
                    target = p.to(tl.float64) * kept_mass(
                        row, vocab, suppress_token, allowed, tile_max, tile_sum, num_tiles, maximum,
                        scale, key, last_id, HAS_ALLOWED, N,
                    )
                cut, above, down_to = cut_of(
                    row, vocab, suppress_token, allowed, tile_max, tile_sum, num_tiles, maximum,
                    scale, target, by_mass, HAS_ALLOWED, N, STATS,
                )
                number, ties = ties_at(cut, above, down_to, target, maximum, scale, by_mass)
                cut_id = tl.zeros([], tl.int32) + NO_ID
                if (cut > LOWEST_KEY) & (number < ties):
                    cut_id = id_of_tie(
                        row, vocab, suppress_token, allowed, tile_max, tile_sum, num_tiles, cut,
                        tl.maximum(number, 1.0).to(tl.int32), HAS_ALLOWED, N,
                    )
                if (cut > key) | ((cut == key) & (cut_id < last_id)):
                    key = cut
                    last_id = cut_id
        least_depth = tl.where(m > 0, tl.log(tl.where(m > 0, m, 1.0)), float("-inf"))
        filtered = (key > LOWEST_KEY) | (m > 0)

        # The draw among what is kept
        seed_key, offset, row_number = row_key(seed, row_id, SEED_PER_ROW)
        if not SEED_PER_ROW:
            row_number += first_row
        best_score = tl.zeros([], tl.float32) + float("-inf")
        winner = tl.zeros([], tl.int32) + NO_ID
        if filtered:
            kept_total = tl.zeros([], tl.float32)
        for start in range(0, num_tiles, N):
            tile, maxima, sums, _ = load_stats(tile_max, tile_sum, start, num_tiles, N)
            active = (order_key(maxima) >= key) & (maxima > float("-inf"))
            if tl.max(active.to(tl.int32), axis=0) > 0:
                log_mass = maxima * inverse_temperature + tl.log(sums)
                if filtered:
                    ids, x = load_visible(
                        row, tile, active, vocab, suppress_token, allowed, HAS_ALLOWED
                    )
                    kept = kept_of(x, ids, key, last_id, maximum, inverse_temperature, least_depth)
                    x = tl.where(kept, x, float("-inf"))
                    maxima, sums, log_mass = draw_tiles(x, scale, inverse_temperature)
                    kept_total += tl.sum(sums * weights(maxima, maximum, scale), axis=0)
                noise = tile_noise(seed_key, row_number, offset, tile)
                score, place = best_of(tl.where(active, log_mass + noise, float("-inf")), tile)
                if score > best_score:
                    best_score = score
                    winner = place
        ids = winner * DRAW_TILE + tl.arange(0, DRAW_TILE)
        inside = (ids < vocab) & (ids != suppress_token)
        if HAS_ALLOWED:
            words = tl.load(allowed + ids // 32, mask=inside, other=0)
            inside &= ((words >> (ids % 32)) & 1) != 0
        x = tl.load(row + ids, mask=inside, other=float("-inf")).to(tl.float32)
        kept = kept_of(x, ids, key, last_id, maximum, inverse_temperature, least_depth)
        x = tl.where(kept, x, float("-inf"))
        token = draw_in_tile(x, winner, 0, inverse_temperature, seed_key, row_number, offset)
        value = tl.max(tl.where(ids == token, x, float("-inf")), axis=0)

    weight = weights(value, maximum, scale)
    top1 = 1.0 / total
    relative = tl.minimum(top1, weight)
    probability = tl.where(greedy, top1, weight / kept_total)
    relative = tl.where(greedy, top1, relative)
    nan = float("nan")
    tl.store(out_token + row_id, token.to(tl.int64))
    tl.store(out_probability + row_id, tl.where(defined, probability, nan))
    tl.store(out_top1 + row_id, tl.where(defined, top1, nan))
    tl.store(out_relative + row_id, tl.where(defined, relative, nan))


def sample_filtered(
    rows: Rows, seed: Tensor, options: DrawOptions, suppress_token: int, first_row: int = 0
) -> Results:
    """The draws of rows first_row, first_row + 1, ... of a call; all tensors are those rows'."""
    device = rows.tensor.device
    results = Results.empty(rows.count, device)
    num_tiles = -(-rows.width // DRAW_TILE.value)
    tile_max, tile_sum = (
        torch.empty((rows.count, num_tiles), dtype=torch.float32, device=device) for _ in range(2)
    )
    words = -(-rows.width // 32)
    row_options = None if options.row_options is None else options.row_options.contiguous()
    allowed = None if options.allowed is None else options.allowed.contiguous()
    mask_stride = 0 if allowed is None or allowed.numel() == words else words
    flags = {"HAS_OPTIONS": row_options is not None, "HAS_ALLOWED": allowed is not None}
    # A pointer is needed for pointer arithmetic, even where nothing is read from it
    mask = results.token.view(torch.int32) if allowed is None else allowed
    draw_tiles_kernel[(rows.count, -(-num_tiles // READ_TILES))](
        rows.tensor, rows.stride, rows.width, suppress_token, options.temperature, row_options,
        mask, mask_stride, tile_max, tile_sum, num_tiles, **flags, N=READ_TILES,
        num_warps=READ_WARPS,
    )
    sample_filtered_kernel[(rows.count,)](
        rows.tensor, rows.stride, rows.width, suppress_token, options.temperature, options.top_k,
        options.top_p, options.min_p, row_options, mask, mask_stride, seed.contiguous(), first_row,
        tile_max, tile_sum, num_tiles, *results, **flags, SEED_PER_ROW=seed.dim() != 1,
        N=READ_TILES, STATS=min(1024, next_power_of_2(num_tiles)), num_warps=ROW_WARPS,
        maxnreg=128,
    )
    return results


@triton.jit(do_not_specialize=["num_tiles"])
def top_p_cut_kernel(
    logits, row_stride, vocab, temperature, top_p, row_options, tile_max, tile_sum, num_tiles,
    out_least, out_id, HAS_OPTIONS: tl.constexpr, N: tl.constexpr, STATS: tl.constexpr,
):
    row_id = tl.program_id(0).to(tl.int64)
    row = logits + row_id * row_stride
    tile_max += row_id * num_tiles
    tile_sum += row_id * num_tiles
    t, _, p, _, valid = options_of(row_options, row_id, temperature, 0, top_p, 0.0, HAS_OPTIONS)
    scale = tl.full([], LOG2_E, tl.float32) / tl.where(valid, t, 1.0)
    maximum, _, any_broken = row_mass(tile_max, tile_sum, num_tiles, scale, STATS)
    value = tl.zeros([], tl.float32) + float("-inf")
    token = tl.zeros([], tl.int32) + NO_ID
    if valid & (t > 0) & (p < 1) & (any_broken == 0) & (maximum > float("-inf")):
        whole = kept_mass(
            row, vocab, -1, row, tile_max, tile_sum, num_tiles, maximum, scale, LOWEST_KEY, NO_ID,
            False, N,
        )
        target = p.to(tl.float64) * whole
        cut, above, down_to = cut_of(
            row, vocab, -1, row, tile_max, tile_sum, num_tiles, maximum, scale, target, True, False,
            N, STATS,
        )
        if cut > LOWEST_KEY:
            value = value_of_key(cut)
            number, ties = ties_at(cut, above, down_to, target, maximum, scale, True)
            number = tl.maximum(tl.minimum(number, ties), 1.0).to(tl.int32)
            token = id_of_tie(
                row, vocab, -1, row, tile_max, tile_sum, num_tiles, cut, number, False, N
            )
    tl.store(out_least + row_id, value)
    tl.store(out_id + row_id, tl.minimum(token, vocab - 1).to(tl.int64))


def cut_rows(
    rows: Rows, top_p: float, temperature: float, temperatures: Tensor | None, least: Tensor,
    last_id: Tensor,
) -> None:
    """Each row's cut at that share of its mass, written to least and last_id; at least one row."""
    options = None
    if temperatures is not None:  # temperature, top_k, top_p, min_p
        off = torch.zeros_like(temperatures)
        options = torch.stack([temperatures, off, torch.full_like(off, top_p), off], dim=-1)
    num_tiles = -(-rows.width // DRAW_TILE.value)
    tile_max, tile_sum = least.new_empty((2, rows.count, num_tiles))
    draw_tiles_kernel[(rows.count, -(-num_tiles // READ_TILES))](
        rows.tensor, rows.stride, rows.width, -1, float(temperature), options, last_id, 0, tile_max,
        tile_sum, num_tiles, HAS_OPTIONS=options is not None, HAS_ALLOWED=False, N=READ_TILES,
        num_warps=READ_WARPS,
    )
    top_p_cut_kernel[(rows.count,)](
        rows.tensor, rows.stride, rows.width, float(temperature), float(top_p), options, tile_max,
        tile_sum, num_tiles, least, last_id, HAS_OPTIONS=options is not None, N=READ_TILES,
        STATS=min(1024, next_power_of_2(num_tiles)), num_warps=ROW_WARPS, maxnreg=128,
    )
