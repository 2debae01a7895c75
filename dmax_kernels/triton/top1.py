"""The most likely tokens and their probabilities, whole or from vocabulary shards.

A first kernel reduces each tile of the vocabulary, a second merges the tiles of a row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dmax_kernels.triton.launch import (
    NO_MASK,
    Mask,
    Rows,
    device_of,
    mask_of,
    next_power_of_2,
    row_view,
)
from dmax_kernels.triton.stats import (
    Partials,
    launch_tile_statistics,
    load_partials,
    merge_statistics,
    merge_sums,
    softmax_scale,
)
from dmax_kernels.triton.topk import topk_of_rows


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
