"""Promotion of the confident prefix of a block's masked positions (Algorithm 1, lines 5-8)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dmax_kernels.triton.launch import device_of, next_power_of_2


@triton.jit
def passes_threshold(confidence, threshold, INCLUSIVE: tl.constexpr):
    """A NaN passes no threshold."""
    if INCLUSIVE:
        return confidence >= threshold
    return confidence > threshold


@triton.jit
def promotable(positions, masked, first_masked, first_failure):
    """The masked positions before the first failure, or else the first masked one."""
    return masked & ((positions < first_failure) | (positions == first_masked))


@triton.jit(do_not_specialize=["block"])
def prefix_promote_kernel(
    confidence, masked, threshold, promoted, block, INCLUSIVE: tl.constexpr, CHUNK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * block

    # First masked position, and the first of them that fails
    first_masked = block
    first_failure = block
    for start in range(0, block, CHUNK):
        at = start + tl.arange(0, CHUNK)
        inside = at < block
        c = tl.load(confidence + row + at, mask=inside, other=0.0)
        m = tl.load(masked + row + at, mask=inside, other=0) != 0
        fails = m & (passes_threshold(c, threshold, INCLUSIVE) == 0)
        first_masked = tl.minimum(first_masked, tl.min(tl.where(m, at, block), axis=0))
        first_failure = tl.minimum(first_failure, tl.min(tl.where(fails, at, block), axis=0))

    for start in range(0, block, CHUNK):
        at = start + tl.arange(0, CHUNK)
        inside = at < block
        m = tl.load(masked + row + at, mask=inside, other=0) != 0
        tl.store(promoted + row + at, promotable(at, m, first_masked, first_failure), mask=inside)


def prefix_promote(
    confidence: Tensor, masked: Tensor, threshold: float, *, inclusive: bool = False
) -> Tensor:
    confidence, masked = confidence.contiguous(), masked.contiguous()
    promoted = torch.empty_like(masked)
    block = confidence.shape[-1]
    if promoted.numel() == 0:
        return promoted
    with device_of(confidence):
        prefix_promote_kernel[(promoted.numel() // block,)](
            confidence, masked, float(threshold), promoted, block,
            INCLUSIVE=inclusive, CHUNK=min(next_power_of_2(block), 1024), num_warps=1,
        )
    return promoted
