"""softmax(logits / temperature) @ embedding, without the probabilities of all rows in memory.

Few rows take one pass over the vocabulary, as in flash attention: a program takes BLOCK_M rows,
BLOCK_D columns of the embedding and some vocabulary tiles of BLOCK_N tokens. It keeps each row's
maximum, sum of exponentials and weighted sum of embeddings, all relative to the maximum so far, and
rescales both sums when it grows. With few rows the vocabulary is split over more programs, whose
results a second kernel merges in a fixed order. No probability is written to memory.

The weights are float32. Against a 16-bit embedding they are split into a high and a low part of
that type: the tensor cores take both, and the products keep 16 bits and more of a weight. That
costs few rows nothing, since they are bound by reading the embedding.

Many rows are in soft_products.py. A cut limits a row to its most probable tokens: the others count
as -inf.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dmax_kernels.triton.launch import (
    Rows,
    device_of,
    next_power_of_2,
    num_multiprocessors,
    row_view,
)
from dmax_kernels.triton.linear_loss import plain_products
from dmax_kernels.triton.sample_filters import cut_rows
from dmax_kernels.triton.soft_products import (
    FLOAT16_UNIT,
    RowOptions,
    above_cut,
    products_of_rows,
)
from dmax_kernels.triton.stats import finite_or_zero, row_scale, softmax_scale

__all__ = ["soft_embedding", "soft_embedding_partial", "top_p_cut"]

# Measured on an H100 with V = 157,184 and D = 2,048 (bench/cases.py): one pass took 243 us for 32
# rows, where eager took 288, and 3,009 us for 256, where eager took 560
LEAST_PRODUCT_ROWS = 33

# Rows per launch at most: the partial results of 2,048 columns stay below 64 MB
MOST_ROWS = 4096
MERGE_COLUMNS = 512


class SoftTiles(NamedTuple):
    block_m: int
    block_n: int
    block_d: int
    num_warps: int
    num_stages: int


def choose_soft_tiles(num_rows: int, dtype: torch.dtype) -> SoftTiles:
    """Few rows are bound by reading the embedding, many by the tensor cores. On an H100 up to
    32 rows take 88 to 92 % of its bandwidth. Other shapes were not timed.

    A tile of 128 rows would spill on sm_80.
    """
    if dtype == torch.float32:  # no tensor cores at full precision
        return SoftTiles(16 if num_rows <= 16 else 32, 32, 64, 4 if num_rows <= 16 else 8, 2)
    if num_rows <= 32:
        return SoftTiles(max(16, next_power_of_2(num_rows)), 64, 128, 4, 3)
    return SoftTiles(64, 64, 128, 8, 3)


@triton.jit
def weighted_sum(weight, e, acc):
    """acc + weight @ e, in FLOAT16_UNIT if e is float16; see the head of this file."""
    if e.dtype == tl.float32:
        return tl.dot(weight, e, acc, input_precision="ieee")
    if e.dtype == tl.float16:
        weight *= FLOAT16_UNIT
    high = weight.to(e.dtype)
    low = (weight - high.to(tl.float32)).to(e.dtype)
    acc = tl.dot(high, e, acc)
    return tl.dot(low, e, acc)


@triton.jit(do_not_specialize=["num_rows", "num_splits", "tiles_per_split"])
def soft_embedding_kernel(
    logits, logits_stride, embedding, embedding_stride, temperatures, num_rows, vocab, dim, scale,
    least, last_id, partial_max, partial_sum, partial_out, num_splits, tiles_per_split,
    HAS_TEMPERATURES: tl.constexpr, HAS_CUT: tl.constexpr, WHOLE_COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    split = tl.program_id(2)
    safe_row = tl.minimum(row, num_rows - 1).to(tl.int64)
    # Clamped columns are loaded one by one: whole blocks of them are not clamped
    safe_column = column if WHOLE_COLUMNS else tl.minimum(column, dim - 1)
    factor = row_scale(temperatures, safe_row, scale, HAS_TEMPERATURES)
    if HAS_CUT:
        lowest = tl.load(least + safe_row)
        # Counted from this shard's first id, it may lie on either side of the shard
        last = tl.minimum(tl.maximum(tl.load(last_id + safe_row), -1), vocab).to(tl.int32)

    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    sum_exp = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    num_tiles = tl.cdiv(vocab, BLOCK_N)
    first = split * tiles_per_split
    for tile in range(first, tl.minimum(first + tiles_per_split, num_tiles)):
        ids = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        # Tokens past the end take the last one's embedding, which needs no mask, and no weight
        token = tl.minimum(ids, vocab - 1).to(tl.int64)
        x = tl.load(
            logits + safe_row[:, None] * logits_stride + ids[None, :],
            mask=(ids < vocab)[None, :], other=float("-inf"),
        ).to(tl.float32)
        if HAS_CUT:
            x = above_cut(x, ids[None, :], lowest[:, None], last[:, None])
        e = tl.load(embedding + token[:, None] * embedding_stride + safe_column[None, :])
        largest = tl.maximum(maximum, tl.max(x, axis=1))
        reference = finite_or_zero(largest)
        weight = tl.exp2((x - reference[:, None]) * factor[:, None])
        decay = tl.exp2((maximum - reference) * factor)
        sum_exp = sum_exp * decay + tl.sum(weight, axis=1)
        acc = weighted_sum(weight, e, acc * decay[:, None])
        maximum = largest
    if embedding.dtype.element_ty == tl.float16:
        acc *= 1.0 / FLOAT16_UNIT

    at = safe_row * num_splits + split
    valid = row < num_rows
    if tl.program_id(1) == 0:
        tl.store(partial_max + at, maximum, mask=valid)
        tl.store(partial_sum + at, sum_exp, mask=valid)
    tl.store(
        partial_out + at[:, None] * dim + column[None, :], acc,
        mask=valid[:, None] & (column < dim)[None, :],
    )


@triton.jit(do_not_specialize=["num_splits"])
def soft_embedding_merge_kernel(
    partial_max, partial_sum, partial_out, temperatures, num_splits, dim, scale,
    out, out_max, out_sum,
    HAS_TEMPERATURES: tl.constexpr, NORMALIZE: tl.constexpr, SPLITS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    factor = row_scale(temperatures, row, scale, HAS_TEMPERATURES)
    splits = tl.arange(0, SPLITS)
    given = splits < num_splits
    maxima = tl.load(partial_max + row * num_splits + splits, mask=given, other=float("-inf"))
    sums = tl.load(partial_sum + row * num_splits + splits, mask=given, other=0.0)
    best = tl.max(maxima, axis=0)
    reference = finite_or_zero(best)
    total = tl.sum(sums * tl.exp2((maxima - reference) * factor), axis=0)
    acc = tl.zeros([COLUMNS], tl.float32)
    for split in range(0, num_splits):
        at = row * num_splits + split
        decay = tl.exp2((tl.load(partial_max + at) - reference) * factor)
        acc += decay * tl.load(partial_out + at * dim + column, mask=column < dim, other=0.0)
    # A NaN or a +inf in the row leaves the sum NaN or +inf
    total = tl.where(total < float("inf"), total, float("nan"))
    if NORMALIZE:
        acc = acc / total
    else:
        acc = tl.where(total == total, acc, float("nan"))
        if tl.program_id(1) == 0:
            tl.store(out_max + row, best)
            tl.store(out_sum + row, total)
    tl.store(out + row * dim + column, acc.to(out.dtype.element_ty), mask=column < dim)


def sum_of_rows(
    logits: Rows, table: Rows, options: RowOptions, out: Tensor, out_max: Tensor | None,
    out_sum: Tensor | None,
) -> None:
    """At most MOST_ROWS rows; out is [rows, D]."""
    rows, vocab, dim, device = logits.count, logits.width, table.width, logits.tensor.device
    tiles = choose_soft_tiles(rows, table.tensor.dtype)
    num_tiles = -(-vocab // tiles.block_n)
    row_blocks, column_blocks = -(-rows // tiles.block_m), -(-dim // tiles.block_d)
    wanted = max(1, 4 * num_multiprocessors(device) // (row_blocks * column_blocks))
    tiles_per_split = -(-num_tiles // min(wanted, num_tiles))
    splits = -(-num_tiles // tiles_per_split)
    partial_max, partial_sum, partial_out = (
        torch.empty((rows, splits, width), dtype=torch.float32, device=device)
        for width in (1, 1, dim)
    )
    temperatures, scale = options.temperatures, softmax_scale(options.temperature)
    given = temperatures is not None
    soft_embedding_kernel[(row_blocks, column_blocks, splits)](
        logits.tensor, logits.stride, table.tensor, table.stride, temperatures, rows, vocab, dim,
        scale, options.least, options.last_id, partial_max, partial_sum, partial_out, splits,
        tiles_per_split, HAS_TEMPERATURES=given, HAS_CUT=options.least is not None,
        WHOLE_COLUMNS=dim % tiles.block_d == 0, BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n, BLOCK_D=tiles.block_d, num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    soft_embedding_merge_kernel[(rows, -(-dim // MERGE_COLUMNS))](
        partial_max, partial_sum, partial_out, temperatures, splits, dim, scale,
        out, out_max, out_sum,
        HAS_TEMPERATURES=given, NORMALIZE=out_max is None, SPLITS=next_power_of_2(splits),
        COLUMNS=MERGE_COLUMNS, num_warps=4,
    )


def sum_of_all_rows(
    logits: Tensor, embedding: Tensor, options: RowOptions, out: Tensor,
    out_max: Tensor | None = None, out_sum: Tensor | None = None,
) -> None:
    if out.numel() == 0:
        return
    rows, table = row_view(logits), row_view(embedding)
    flat = rows.tensor.as_strided((rows.count, rows.width), (rows.stride, 1))
    options = options.in_rows()
    with plain_products(logits):
        for first in range(0, rows.count, MOST_ROWS):
            span = slice(first, min(first + MOST_ROWS, rows.count))
            part = Rows(flat[span], span.stop - first, rows.width, rows.stride)
            sum_rows = products_of_rows if part.count >= LEAST_PRODUCT_ROWS else sum_of_rows
            sum_rows(
                part, table, options.span(span), out.view(-1, table.width)[span],
                None if out_max is None else out_max.view(-1)[span],
                None if out_sum is None else out_sum.view(-1)[span],
            )


def soft_embedding(
    logits: Tensor, embedding: Tensor, *, temperature: float = 1.0,
    temperatures: Tensor | None = None, least: Tensor | None = None, last_id: Tensor | None = None,
) -> Tensor:
    out = embedding.new_empty((*logits.shape[:-1], embedding.shape[1]))
    options = RowOptions(temperature, temperatures, least, last_id)
    sum_of_all_rows(logits, embedding, options, out)
    return out


def soft_embedding_partial(
    logits_shard: Tensor, embedding_shard: Tensor, *, temperature: float = 1.0,
    temperatures: Tensor | None = None, least: Tensor | None = None, last_id: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    shape, device = logits_shard.shape[:-1], logits_shard.device
    maximum, sum_exp = (torch.empty(shape, dtype=torch.float32, device=device) for _ in range(2))
    weighted = torch.empty((*shape, embedding_shard.shape[1]), dtype=torch.float32, device=device)
    options = RowOptions(temperature, temperatures, least, last_id)
    sum_of_all_rows(logits_shard, embedding_shard, options, weighted, maximum, sum_exp)
    return maximum, sum_exp, weighted


def top_p_cut(
    logits: Tensor, top_p: float, *, temperature: float = 1.0, temperatures: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    shape, device = logits.shape[:-1], logits.device
    least = torch.empty(shape, dtype=torch.float32, device=device)
    last_id = torch.empty(shape, dtype=torch.int64, device=device)
    if least.numel() > 0:
        with device_of(logits):
            cut_rows(row_view(logits), top_p, temperature, temperatures, least, last_id)
    return least, last_id
