"""The sample of the whole vocabulary from the partial results of its shards."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dmax_kernels.triton.launch import device_of, next_power_of_2
from dmax_kernels.triton.stats import finite_or_zero, merge_sums, softmax_scale
from dmax_kernels.triton.top1_merge import NO_ID_64, shard_places, winning_token


@triton.jit(do_not_specialize=["num_shards"])
def sample_merge_kernel(
    maximum, sum_exp, token, score, weight, num_shards, num_rows, scale, out_token,
    out_probability, SHARDS: tl.constexpr,
):  # fmt: skip
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
        )  # fmt: skip
    return out_token, out_probability
