"""Most likely token and its probability: tiles' statistics, then one merge per row."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dmax_kernels.triton.launch import Rows, device_of, next_power_of_2, row_view
from dmax_kernels.triton.stats import (
    Partials,
    launch_tile_statistics,
    load_partials,
    merge_statistics,
    softmax_scale,
)


@triton.jit
def confidence_of(maximum, sum_exp):
    """softmax at the maximum is 1 / sum; NaN where the maximum is infinite."""
    return tl.where(tl.abs(maximum) == float("inf"), float("nan"), 1.0 / sum_exp)


@triton.jit(do_not_specialize=["num_tiles", "frozen_span"])
def top1_merge_tiles_kernel(
    partial_max, partial_sum, partial_token, num_tiles, scale, frozen, frozen_span,
    token, confidence, HAS_FROZEN: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
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
) -> tuple[Tensor, Tensor]:
    """[rows] each; a frozen span's results are left unset."""
    device = rows.tensor.device
    token = torch.empty(rows.count, dtype=torch.int64, device=device)
    confidence = torch.empty(rows.count, dtype=torch.float32, device=device)
    if rows.count == 0:
        return token, confidence
    scale = softmax_scale(temperature)
    partials = launch_tile_statistics(rows, suppress_token, scale, frozen, frozen_span)
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
    )  # fmt: skip


def top1_confidence(
    logits: Tensor, *, temperature: float = 1.0, suppress_token: int = -1
) -> tuple[Tensor, Tensor]:
    with device_of(logits):
        token, confidence = top1_of_rows(row_view(logits), temperature, suppress_token)
    return token.view(logits.shape[:-1]), confidence.view(logits.shape[:-1])
