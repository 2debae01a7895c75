"""hidden @ weight^T tile by tile, reduced to softmax statistics or a sample without storing logits.

One program takes BLOCK_M rows and some vocabulary tiles of BLOCK_N tokens: a matrix product with
float32 accumulators, then the online update of every row's (maximum, sum of exponentials, id).
Only those are written to memory. A logit is the float32 accumulator plus the bias, never rounded to
the inputs' dtype. Programs of one vocabulary tile run side by side: one of them reads the weight's
tile from memory, the others from L2.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.target_info import cuda_capability_geq

from dmax_kernels.triton.launch import (
    Rows,
    next_power_of_2,
    num_multiprocessors,
)
from dmax_kernels.triton.philox import DRAW_TILE, id_noise, tile_noise
from dmax_kernels.triton.stats import NO_ID, finite_or_zero, softmax_scale

# Rows per launch at most. This keeps the partial results below 8 MB, and it costs nothing: so many
# rows are bound by the matrix product and not by reading the weight
MOST_ROWS = 4096
# Tokens per program at most, for the same bound
MOST_TOKENS = 2048

# From so many rows on linear_chunks.py's products replace the fused kernel; None stands for never.
# Measured on an H100 with V = 157,184 and D = 2,048 (bench/gpu_session.py times both ways):
#  - float32 has no tensor cores at full precision, and tl.dot reaches a third of cuBLAS's rate: the
#    fused kernel took 3.7 times as long for one row, and 3.9 times for 1,024.
#  - 16-bit top1_confidence: the fused kernel was faster than the whole product and top1_confidence
#    after it up to 256 rows, and 6 % slower at 4,096.
#  - a 16-bit draw takes the tiles of 64 tokens that are drawn together, too narrow for the tensor
#    cores: level with the whole product at 64 rows, 1.7 times its time from 256 rows on.
LEAST_CHUNKED_ROWS: dict[torch.dtype, int | None] = {
    torch.float32: 1,
    torch.bfloat16: None,
    torch.float16: None,
}
LEAST_CHUNKED_ROWS_SAMPLING: dict[torch.dtype, int | None] = {
    torch.float32: 1,
    torch.bfloat16: 65,
    torch.float16: 65,
}


class LinearTiles(NamedTuple):
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    tiles_per_program: int


def precision_of(dtype: torch.dtype) -> str:
    """tl.dot's; it has no meaning for 16-bit inputs, whose products are exact."""
    return "ieee" if dtype == torch.float32 else "tf32"


def compiles_for_hopper() -> bool:
    if triton.knobs.runtime.interpret:
        return False
    return triton.runtime.driver.active.get_current_target().arch == 90


def choose_linear_tiles(
    num_rows: int, vocab: int, dtype: torch.dtype, device: torch.device, *, sampling: bool = False,
    wide: bool = True,
) -> LinearTiles:
    """Few rows are bound by reading the weight: small tiles, several programs per multiprocessor,
    each with four stages of loads in flight. Many rows are bound by the tensor cores: the largest
    tile whose accumulators fit the registers. Of seven shapes for 16 bits, an H100 was fastest with
    the one below at 4,096 rows; at 512 rows a fourth stage saved 3 %. Others were not timed.
    """
    block_m = min(num_rows, 128 if num_rows > 64 else 64)
    if dtype == torch.float32:  # no tensor cores at full precision, and rows twice as wide
        block_m, block_n, block_k, num_warps, num_stages = min(block_m, 64), 64, 32, 4, 3
        if sampling and num_rows > 16:  # four warps spill, and so do 64 rows on Ampere
            block_m, num_warps = 32, 8
    elif sampling:  # the 64 tokens of a draw tile
        block_n, block_k, num_warps, num_stages = 64, 64, 4 if num_rows <= 64 else 8, 4
        if num_rows <= 32:
            block_k, num_stages = 128, 3
    elif num_rows <= 16:
        block_n, block_k, num_warps, num_stages = 128, 128, 4, 3
    elif num_rows <= 128:
        block_n, block_k, num_warps, num_stages = 128, 64, 4 if num_rows <= 64 else 8, 4
        if num_rows <= 32 and not compiles_for_hopper():  # 128 tokens spill on Blackwell
            block_n = 64
    elif wide and compiles_for_hopper():  # spills elsewhere
        block_n, block_k, num_warps, num_stages = 256, 64, 8, 3
    else:
        block_n, block_k, num_warps, num_stages = 128, 64, 8, 3
    block_m = max(16, next_power_of_2(block_m))  # 16 is the least the tensor cores take
    tiles = -(-num_rows // block_m) * -(-vocab // block_n)
    programs = 4 * num_multiprocessors(device)
    per_program = max(1, min(MOST_TOKENS // block_n, tiles // programs))
    return LinearTiles(block_m, block_n, block_k, num_warps, num_stages, per_program)


@triton.jit
def logits_tile(
    hidden_rows, weight, weight_stride, bias, first, vocab, dim, suppress_token,
    PRECISION: tl.constexpr, EVEN_K: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """Ids [N] and logits [M, N] of one vocabulary tile, -inf at the suppressed id and past the end.

    Tokens past the end take the last token's weights, which needs no masks.
    """
    ids = first + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    token = tl.minimum(ids, vocab - 1).to(tl.int64)
    hidden_at = hidden_rows[:, None] + k[None, :]
    weight_at = weight + token[None, :] * weight_stride + k[:, None]
    x = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, dim, BLOCK_K):
        if EVEN_K:
            a = tl.load(hidden_at)
            b = tl.load(weight_at)
        else:
            a = tl.load(hidden_at, mask=(k < dim - start)[None, :], other=0.0)
            b = tl.load(weight_at, mask=(k < dim - start)[:, None], other=0.0)
        x = tl.dot(a, b, x, input_precision=PRECISION)
        hidden_at += BLOCK_K
        weight_at += BLOCK_K
    if HAS_BIAS:
        x += tl.load(bias + token).to(tl.float32)[None, :]
    visible = (ids < vocab) & (ids != suppress_token)
    return ids, tl.where(visible[None, :], x, float("-inf"))


@triton.jit
def any_of(flags):
    """Whether any of the flags [M] is set.

    On Blackwell, whose tensor cores write 64 rows or more to a memory of their own, the flags are
    reduced as a matrix of one row: reduced as they are, they stop the compiler of Triton 3.7
    ("parent layout must have at least rank >= 2"). Elsewhere that form would spill.
    """
    if cuda_capability_geq(10) and flags.shape[0] >= 64:
        return tl.max(tl.max(flags.to(tl.int32)[None, :], axis=1), axis=0) > 0
    return tl.max(flags.to(tl.int32), axis=0) > 0


@triton.jit(do_not_specialize=["num_rows", "suppress_token", "num_groups", "tiles_per_program"])
def linear_statistics_kernel(
    hidden, hidden_stride, weight, weight_stride, bias, num_rows, vocab, dim, suppress_token, scale,
    seed, first_row, inverse_temperature,
    partial_max, partial_sum, partial_token, partial_score, partial_value,
    num_groups, tiles_per_program,
    PRECISION: tl.constexpr, EVEN_K: tl.constexpr, HAS_BIAS: tl.constexpr, SAMPLE: tl.constexpr,
    SEED_PER_ROW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    group = tl.program_id(1)
    safe_row = tl.minimum(row, num_rows - 1).to(tl.int64)
    hidden_rows = hidden + safe_row * hidden_stride
    if SAMPLE:
        if SEED_PER_ROW:
            key = tl.load(seed + safe_row * 2)
            offset = tl.load(seed + safe_row * 2 + 1)
            counter_row = safe_row * 0
        else:
            key = tl.load(seed + safe_row * 0)
            offset = tl.load(seed + safe_row * 0 + 1)
            counter_row = safe_row + first_row

    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    sum_exp = tl.zeros([BLOCK_M], tl.float32)
    token = tl.full([BLOCK_M], NO_ID, tl.int32)
    nan_token = tl.full([BLOCK_M], NO_ID, tl.int32)
    best_score = tl.full([BLOCK_M], float("-inf"), tl.float32)
    if SAMPLE:  # the best draw tile of each row, and its logits
        tl.static_assert(BLOCK_N == DRAW_TILE)
        best_tile = tl.full([BLOCK_M], NO_ID, tl.int32)
        best_x = tl.full([BLOCK_M, BLOCK_N], float("-inf"), tl.float32)

    num_tiles = tl.cdiv(vocab, BLOCK_N)
    first_tile = group * tiles_per_program
    for tile in range(first_tile, tl.minimum(first_tile + tiles_per_program, num_tiles)):
        ids, x = logits_tile(
            hidden_rows, weight, weight_stride, bias, tile * BLOCK_N, vocab, dim, suppress_token,
            PRECISION, EVEN_K, HAS_BIAS, BLOCK_M, BLOCK_N, BLOCK_K,
        )

        # The tile's maximum, and the sum relative to the larger of both maxima
        tile_max = tl.max(x, axis=1)
        new_max = tl.maximum(maximum, tile_max)
        reference = finite_or_zero(new_max)
        if SAMPLE:  # the draw takes the sum relative to the tile's own maximum
            own_reference = finite_or_zero(tile_max)
            own_sum = tl.sum(tl.exp2((x - own_reference[:, None]) * scale), axis=1)
            tile_sum = own_sum * tl.exp2((tile_max - reference) * scale)
        else:
            tile_sum = tl.sum(tl.exp2((x - reference[:, None]) * scale), axis=1)
        sum_exp = sum_exp * tl.exp2((maximum - reference) * scale) + tile_sum

        if SAMPLE:
            noise = tile_noise(key, counter_row, offset, tile + row * 0)
            score = tile_max * inverse_temperature + tl.log(own_sum) + noise
            score = tl.where(tile_max == float("inf"), float("inf"), score)
            better = (score > best_score) | (best_tile == NO_ID)
            best_score = tl.where(better, score, best_score)
            best_tile = tl.where(better, tile, best_tile)
            best_x = tl.where(better[:, None], x, best_x)
        else:
            # `token` is NO_ID before the first tile and an id after it, even if all are -inf
            top = tl.min(tl.where(x == tile_max[:, None], ids[None, :], NO_ID), axis=1)
            better = (tile_max > maximum) | (token == NO_ID)
            token = tl.where(better, top, token)
        maximum = new_max

        # A NaN, which is rare: the first one's id
        if any_of(tile_sum != tile_sum):
            first_nan = tl.min(tl.where(x != x, ids[None, :], NO_ID), axis=1)
            nan_token = tl.minimum(nan_token, first_nan)

    if SAMPLE:  # the id drawn in the best tile
        noise = id_noise(key[:, None], counter_row[:, None], offset[:, None], best_tile[:, None])
        perturbed = best_x * inverse_temperature + noise
        ids = best_tile[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        top = tl.max(perturbed, axis=1)
        token = tl.min(tl.where(perturbed == top[:, None], ids, NO_ID), axis=1)
        value = tl.max(tl.where(ids == token[:, None], best_x, float("-inf")), axis=1)

    maximum = tl.where(nan_token != NO_ID, float("nan"), maximum)
    token = tl.where(nan_token != NO_ID, nan_token, token)
    at = safe_row * num_groups + group
    valid = row < num_rows
    tl.store(partial_max + at, maximum, mask=valid)
    tl.store(partial_sum + at, sum_exp, mask=valid)
    tl.store(partial_token + at, token, mask=valid)
    if SAMPLE:
        tl.store(partial_score + at, best_score, mask=valid)
        tl.store(partial_value + at, value, mask=valid)


class LinearPartials(NamedTuple):
    """[rows, groups of tiles] each; score and value (the sampled logit) only where sampling."""

    maximum: Tensor
    sum_exp: Tensor
    token: Tensor
    score: Tensor | None
    value: Tensor | None
    num_groups: int


def takes_chunks(num_rows: int, dtype: torch.dtype, sampling: bool) -> bool:
    least = (LEAST_CHUNKED_ROWS_SAMPLING if sampling else LEAST_CHUNKED_ROWS)[dtype]
    if least is None or num_rows < least:
        return False
    # Where TensorFloat-32 is switched on, the library's product would be one
    return dtype != torch.float32 or torch.backends.cuda.matmul.fp32_precision != "tf32"


def fused_statistics(
    hidden: Rows, weight: Rows, bias: Tensor | None, temperature: float, suppress_token: int,
    seed: Tensor | None, first_row: int, tiles: LinearTiles, partials: tuple[Tensor | None, ...],
    num_groups: int,
) -> None:
    dtype, dim, sampling = hidden.tensor.dtype, hidden.width, seed is not None
    linear_statistics_kernel[(-(-hidden.count // tiles.block_m), num_groups)](
        hidden.tensor, hidden.stride, weight.tensor, weight.stride, bias,
        hidden.count, weight.count, dim, suppress_token, softmax_scale(temperature),
        seed, first_row, 1.0 / temperature, *partials, num_groups, tiles.tiles_per_program,
        PRECISION=precision_of(dtype),
        EVEN_K=dim % tiles.block_k == 0, HAS_BIAS=bias is not None,
        SAMPLE=sampling, SEED_PER_ROW=sampling and seed.dim() == 2,
        BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_K=tiles.block_k,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )


def linear_statistics(
    hidden: Rows, weight: Rows, bias: Tensor | None, temperature: float, suppress_token: int,
    seed: Tensor | None = None,
) -> Iterator[tuple[slice, LinearPartials]]:
    """Yields (rows, their partial results); ``seed``, [2] or [rows, 2], asks for samples."""
    device, dtype = hidden.tensor.device, hidden.tensor.dtype
    sampling, seed_per_row = seed is not None, seed is not None and seed.dim() == 2
    flat = hidden.tensor.as_strided((hidden.count, hidden.width), (hidden.stride, 1))
    plans = []
    for first in range(0, hidden.count, MOST_ROWS):
        count = min(MOST_ROWS, hidden.count - first)
        tiles = choose_linear_tiles(
            count, weight.count, dtype, device, sampling=sampling
        )
        group_tokens = tiles.block_n * tiles.tiles_per_program
        plans.append((first, count, tiles, -(-weight.count // group_tokens)))
    # One set of buffers for all slices of rows: the stream runs a slice's kernels in order
    most = max((count * num_groups for _, count, _, num_groups in plans), default=0)
    kinds = [torch.float32, torch.float32, torch.int32] + [torch.float32] * 2 * sampling
    buffers = [torch.empty(most, dtype=kind, device=device) for kind in kinds]
    for first, count, tiles, num_groups in plans:
        span = slice(first, first + count)
        rows = Rows(flat[span], count, hidden.width, hidden.stride)
        partials = [each[: count * num_groups].view(count, num_groups) for each in buffers]
        partials += [None] * (5 - len(partials))
        fused_statistics(
            rows, weight, bias, temperature, suppress_token, seed[span] if seed_per_row else seed,
            first, tiles, partials, num_groups,
        )
        yield span, LinearPartials(*partials, num_groups)
