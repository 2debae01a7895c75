"""Log-probabilities and ranks of given tokens: statistics and counts of tiles, then a merge.

The most likely tokens beside them are those of topk_confidence's kernels, a second read.
"""

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
from dmax_kernels.triton.loss import merge_log_sums
from dmax_kernels.triton.stats import (
    load_visible_tile,
    softmax_scale,
    sum_of_exponentials,
    tiles_of_program,
)
from dmax_kernels.triton.topk import topk_of_rows


@triton.jit
def logit_of(row, token, known, allowed, HAS_ALLOWED: tl.constexpr):
    """The token's logit, NaN if it is not known, -inf if the row's mask does not allow it."""
    value = tl.load(row + token, mask=known, other=float("nan")).to(tl.float32)
    if HAS_ALLOWED:
        word = tl.load(allowed + token // 32, mask=known, other=-1)
        value = tl.where(((word >> (token % 32).to(tl.int32)) & 1) != 0, value, float("-inf"))
    return value


@triton.jit
def store_tile_counts(
    row, tile, vocab, allowed, tokens, per_row, scale, out_max, out_sum, out_counts,
    HAS_ALLOWED: tl.constexpr, MASKED: tl.constexpr, TILE: tl.constexpr,
):
    ids, x = load_visible_tile(row, tile * TILE, vocab, -1, allowed, HAS_ALLOWED, MASKED, TILE)
    maximum = tl.max(x, axis=0)
    tl.store(out_max + tile, maximum)
    tl.store(out_sum + tile, sum_of_exponentials(x, maximum, scale))
    for j in range(per_row):
        token = tl.load(tokens + j).to(tl.int64)
        known = (token >= 0) & (token < vocab)
        value = logit_of(row, token, known, allowed, HAS_ALLOWED)
        # In front of the token: NaN, the larger values, and of its equals those of a lower id
        nan, lower = x != x, ids < token
        ahead = tl.where(value != value, nan & lower, (x > value) | nan | ((x == value) & lower))
        before = tl.where(ids < vocab, ahead.to(tl.int32), 0)
        tl.store(out_counts + tile * per_row + j, tl.sum(before, axis=0))


@triton.jit(do_not_specialize=["mask_stride", "num_tiles", "tiles_per_program", "per_row"])
def tile_counts_kernel(
    logits, row_stride, vocab, allowed, mask_stride, tokens, scale, partial_max, partial_sum,
    partial_counts, num_tiles, tiles_per_program, per_row, HAS_ALLOWED: tl.constexpr,
    TILE: tl.constexpr,
):
    row_id = tl.program_id(0).to(tl.int64)
    row = logits + row_id * row_stride
    if HAS_ALLOWED:
        allowed += row_id * mask_stride
    row_tokens = tokens + row_id * per_row
    out_max = partial_max + row_id * num_tiles
    out_sum = partial_sum + row_id * num_tiles
    out_counts = partial_counts + row_id * num_tiles * per_row

    first, last, full_tiles = tiles_of_program(num_tiles, tiles_per_program, vocab, TILE)
    for tile in range(first, tl.minimum(last, full_tiles)):
        store_tile_counts(
            row, tile, vocab, allowed, row_tokens, per_row, scale, out_max, out_sum, out_counts,
            HAS_ALLOWED, False, TILE,
        )
    if last > full_tiles:
        store_tile_counts(
            row, full_tiles, vocab, allowed, row_tokens, per_row, scale, out_max, out_sum,
            out_counts, HAS_ALLOWED, True, TILE,
        )


@triton.jit(do_not_specialize=["mask_stride", "num_tiles", "ignore_index", "per_row", "top_n"])
def logprobs_merge_kernel(
    logits, row_stride, vocab, allowed, mask_stride, tokens, ignore_index, scale,
    inverse_temperature,
    partial_max, partial_sum, partial_counts, num_tiles, top_ids,
    logprob, rank, top_logprobs, logsumexp, per_row, top_n,
    HAS_ALLOWED: tl.constexpr, TILES: tl.constexpr,
):
    row_id = tl.program_id(0).to(tl.int64)
    row = logits + row_id * row_stride
    if HAS_ALLOWED:
        allowed += row_id * mask_stride
    tiles = tl.arange(0, TILES)
    valid = tiles < num_tiles
    maxima = tl.load(partial_max + row_id * num_tiles + tiles, mask=valid, other=float("-inf"))
    sums = tl.load(partial_sum + row_id * num_tiles + tiles, mask=valid, other=0.0)
    best, log_sum = merge_log_sums(maxima, sums, scale)
    tl.store(logsumexp + row_id, best * inverse_temperature + log_sum)
    for j in range(per_row):
        at = row_id * per_row + j
        token = tl.load(tokens + at).to(tl.int64)
        ignored = token == ignore_index
        known = (token >= 0) & (token < vocab)
        value = logit_of(row, token, known, allowed, HAS_ALLOWED)
        value = (value - best) * inverse_temperature - log_sum
        counts = tl.load(
            partial_counts + (row_id * num_tiles + tiles) * per_row + j, mask=valid, other=0
        )
        count = tl.sum(counts, axis=0).to(tl.int64)
        tl.store(logprob + at, tl.where(ignored, 0.0, value))
        tl.store(rank + at, tl.where(known & (ignored == 0), count, -1))
    for j in range(top_n):
        at = row_id * top_n + j
        value = logit_of(row, tl.load(top_ids + at), True, allowed, HAS_ALLOWED)
        tl.store(top_logprobs + at, (value - best) * inverse_temperature - log_sum)


def token_logprobs(
    logits: Tensor,
    ids: Tensor,
    *,
    temperature: float = 1.0,
    top_n: int = 0,
    ignore_index: int = -100,
    allowed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    shape, device = logits.shape[:-1], logits.device
    per_row = 1 if ids.dim() < logits.dim() else ids.shape[-1]
    logprob = torch.empty(ids.shape, dtype=torch.float32, device=device)
    rank = torch.empty(ids.shape, dtype=torch.int64, device=device)
    top_ids = torch.empty((*shape, top_n), dtype=torch.int64, device=device)
    top_logprobs = torch.empty((*shape, top_n), dtype=torch.float32, device=device)
    logsumexp = torch.empty(shape, dtype=torch.float32, device=device)
    if logsumexp.numel() == 0:
        return logprob, rank, top_ids, top_logprobs, logsumexp
    with device_of(logits):
        rows, tokens, mask = row_view(logits), ids.contiguous(), mask_of(allowed)
        if top_n > 0:
            top_ids = topk_of_rows(rows, top_n, 1.0, -1, mask=mask)[0].view(top_ids.shape)
        scale = softmax_scale(temperature)
        tiles = choose_tiles(rows.count, rows.width, device)
        partials = [
            torch.empty((rows.count, tiles.count), dtype=torch.float32, device=device)
            for _ in range(2)
        ]
        counts = torch.empty((rows.count, tiles.count, per_row), dtype=torch.int32, device=device)
        tile_counts_kernel[(rows.count, tiles.programs)](
            rows.tensor, rows.stride, rows.width, *mask, tokens, scale, *partials, counts,
            tiles.count, tiles.per_program, per_row, HAS_ALLOWED=mask.given, TILE=TILE,
            num_warps=mask.tile_warps,
        )
        logprobs_merge_kernel[(rows.count,)](
            rows.tensor, rows.stride, rows.width, *mask, tokens, ignore_index, scale,
            1.0 / temperature, *partials, counts, tiles.count, top_ids, logprob, rank, top_logprobs,
            logsumexp, per_row, top_n, HAS_ALLOWED=mask.given,
            TILES=next_power_of_2(tiles.count), num_warps=1,
        )
    return logprob, rank, top_ids, top_logprobs, logsumexp
