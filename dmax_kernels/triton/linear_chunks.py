"""hidden @ weight^T by the library's matrix product, a chunk of the vocabulary at a time.

This replaces the fused kernel of linear_rows.py at shapes where cuBLAS's rate is worth writing the
logits out once: a float32 buffer of at most CHUNK_BYTES takes the product of one chunk, and one
read of the buffer gives the same partial results per tile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dmax_kernels.triton.draw import sample_of_tiles
from dmax_kernels.triton.launch import Mask, Rows
from dmax_kernels.triton.philox import DRAW_TILE, row_key
from dmax_kernels.triton.stats import softmax_scale, tile_statistics

CHUNK_TILE = 1024  # tokens per program
# An H100 takes 4,096 rows at close to its full rate in chunks of 4,096 tokens: 512 tiles of
# 256 x 128 logits, four waves. With a buffer of 6 MB (three waves of a third) it took twice the
# time of the whole product.
CHUNK_BYTES = 64 << 20


@triton.jit(
    do_not_specialize=[
        "first", "count", "suppress_token", "mask_stride", "first_row", "num_tiles",
    ]
)  # fmt: skip
def chunk_statistics_kernel(
    logits, logits_stride, bias, first, count, suppress_token, allowed, mask_stride, scale,
    seed, first_row, inverse_temperature,
    partial_max, partial_sum, partial_token, partial_score, partial_value, num_tiles,
    HAS_BIAS: tl.constexpr, HAS_ALLOWED: tl.constexpr, SAMPLE: tl.constexpr,
    SEED_PER_ROW: tl.constexpr, TILE: tl.constexpr,
):
    """Reduces tokens first .. first + count, whose logits are in the buffer.

    first is a multiple of TILE.
    """
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * TILE + tl.arange(0, TILE)
    tile = first // TILE + tl.program_id(1)
    ids = first + place
    buffer_row = logits + row * logits_stride
    # A mask would rule out 16-byte loads: only the tile that the vocabulary's end cuts has one
    if (tl.program_id(1) + 1) * TILE <= count:
        x = tl.load(buffer_row + place)
    else:
        x = tl.load(buffer_row + place, mask=place < count, other=float("-inf"))
    if HAS_BIAS:
        x += tl.load(bias + ids, mask=place < count, other=0.0).to(tl.float32)
    x = tl.where(ids == suppress_token, float("-inf"), x)
    if HAS_ALLOWED:
        words = tl.load(allowed + row * mask_stride + ids // 32, mask=place < count, other=0)
        x = tl.where(((words >> (ids % 32)) & 1) != 0, x, float("-inf"))
    at = row * num_tiles + tile
    if SAMPLE:
        key, offset, row_number = row_key(seed, row, SEED_PER_ROW)
        if not SEED_PER_ROW:
            row_number += first_row
        N: tl.constexpr = TILE // DRAW_TILE
        maximum, sum_exp, score, token = sample_of_tiles(
            tl.reshape(x, [N, DRAW_TILE]), tl.reshape(ids, [N, DRAW_TILE]), tile * N, 0, scale,
            inverse_temperature, key, row_number, offset, N,
        )
        tl.store(partial_score + at, score)
        tl.store(partial_value + at, tl.max(tl.where(ids == token, x, float("-inf")), axis=0))
    else:
        maximum, sum_exp, token = tile_statistics(x, ids, scale)
    tl.store(partial_max + at, maximum)
    tl.store(partial_sum + at, sum_exp)
    tl.store(partial_token + at, token)


def float32_product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b with float32 sums, never rounded to the inputs' dtype.

    Under autocast pass `out`: that form is not on autocast's list, which would make the product of
    two float32 tensors 16 bits wide.
    """
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    return torch.mm(a.float(), b.float(), out=out)  # the interpreter's CPU has no such product


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b with float32 sums, in the product's own epilogue."""
    if a.is_cuda and a.dtype != torch.float32:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        torch.addmm(total, a.float(), b.float(), out=total)


def chunk_buffer(hidden: Tensor, rows: int, vocab: int) -> Tensor:
    """For the logits of one chunk: whole tiles of tokens."""
    tiles = max(1, min(CHUNK_BYTES // (4 * CHUNK_TILE * rows), -(-vocab // CHUNK_TILE)))
    return hidden.new_empty((rows, tiles * CHUNK_TILE), dtype=torch.float32)


def chunk_statistics(
    hidden: Rows, weight: Rows, bias: Tensor | None, temperature: float, suppress_token: int,
    seed: Tensor | None, first_row: int, mask: Mask, partials: tuple[Tensor | None, ...],
    buffer: Tensor,
) -> None:
    """Fills in the partial results, [rows, tiles] each."""
    vocab = weight.count
    table = weight.tensor.as_strided((vocab, weight.width), (weight.stride, 1))
    for first in range(0, vocab, buffer.shape[1]):
        count = min(buffer.shape[1], vocab - first)
        logits = buffer[:, :count]
        float32_product(hidden.tensor, table[first : first + count].t(), out=logits)
        chunk_statistics_kernel[(hidden.count, -(-count // CHUNK_TILE))](
            logits, buffer.stride(0), bias, first, count, suppress_token, *mask,
            softmax_scale(temperature), seed, first_row, 1.0 / temperature, *partials,
            -(-vocab // CHUNK_TILE),
            HAS_BIAS=bias is not None, HAS_ALLOWED=mask.given, SAMPLE=seed is not None,
            SEED_PER_ROW=seed is not None and seed.dim() == 2, TILE=CHUNK_TILE, num_warps=4,
        )
