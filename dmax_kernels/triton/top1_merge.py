"""The top-1 of the whole vocabulary from the partial results of its shards."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dmax_kernels.triton.launch import device_of, next_power_of_2
from dmax_kernels.triton.stats import merge_sums, softmax_scale
from dmax_kernels.triton.top1 import confidence_of

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
):  # fmt: skip
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
        )  # fmt: skip
    return out_token, out_confidence
