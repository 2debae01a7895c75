"""The top-1 of the whole vocabulary from the partial results of its shards."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dmax_kernels.triton import checks
from dmax_kernels.triton.launch import device_of, next_power_of_2
from dmax_kernels.triton.stats import LOG2_E, merge_sums
from dmax_kernels.triton.top1_confidence import confidence_of

NO_ID_64 = tl.constexpr(0x7FFFFFFFFFFFFFFF)


@triton.jit(do_not_specialize=["num_shards"])
def top1_merge_kernel(
    maximum, sum_exp, token, num_shards, num_rows, log2_e, out_token, out_confidence,
    SHARDS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    shards = tl.arange(0, SHARDS)
    valid = shards < num_shards
    at = shards.to(tl.int64) * num_rows + row
    maxima = tl.load(maximum + at, mask=valid, other=float("-inf"))
    sums = tl.load(sum_exp + at, mask=valid, other=0.0)
    tokens = tl.load(token + at, mask=valid, other=NO_ID_64)

    best = tl.max(maxima, axis=0)
    winner = tl.min(tl.where(maxima == best, tokens, NO_ID_64), axis=0)
    nan_winner = tl.min(tl.where(maxima != maxima, tokens, NO_ID_64), axis=0)
    confidence = confidence_of(best, merge_sums(maxima, sums, best, log2_e))
    if nan_winner != NO_ID_64:
        winner = nan_winner
        confidence = float("nan")
    tl.store(out_token + row, winner)
    tl.store(out_confidence + row, confidence)


def top1_merge(maximum: Tensor, sum_exp: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
    op = "top1_merge"
    checks.check_dtype(op, "maximum", maximum, torch.float32)
    checks.check_dtype(op, "sum_exp", sum_exp, torch.float32)
    checks.check_dtype(op, "token", token, torch.int64)
    checks.check(
        maximum.dim() >= 1 and maximum.shape[0] >= 1,
        f"{op}: maximum must be [S, ...] with S >= 1 shards, got {list(maximum.shape)}",
    )
    checks.check_shape(op, "sum_exp", sum_exp, maximum.shape, "that of maximum")
    checks.check_shape(op, "token", token, maximum.shape, "that of maximum")
    checks.check_same_device(op, "sum_exp", sum_exp, "maximum", maximum)
    checks.check_same_device(op, "token", token, "maximum", maximum)
    num_shards, shape = maximum.shape[0], maximum.shape[1:]
    out_token = torch.empty(shape, dtype=torch.int64, device=maximum.device)
    out_confidence = torch.empty(shape, dtype=torch.float32, device=maximum.device)
    if out_token.numel() == 0:
        return out_token, out_confidence
    with device_of(maximum):
        top1_merge_kernel[(out_token.numel(),)](
            maximum.contiguous(), sum_exp.contiguous(), token.contiguous(),
            num_shards, out_token.numel(), LOG2_E, out_token, out_confidence,
            SHARDS=next_power_of_2(num_shards), num_warps=1,
        )  # fmt: skip
    return out_token, out_confidence
