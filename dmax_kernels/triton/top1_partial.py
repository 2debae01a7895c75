"""One vocabulary shard's maximum, sum of exponentials and token id."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dmax_kernels.triton.launch import device_of, next_power_of_2, row_view
from dmax_kernels.triton.stats import (
    launch_tile_statistics,
    load_partials,
    merge_statistics,
    softmax_scale,
)


@triton.jit(do_not_specialize=["num_tiles", "vocab_start"])
def partial_merge_tiles_kernel(
    partial_max, partial_sum, partial_token, num_tiles, scale, vocab_start,
    maximum, sum_exp, token, TILES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    maxima, sums, tokens = load_partials(
        partial_max, partial_sum, partial_token, row, num_tiles, TILES
    )
    best, total, winner = merge_statistics(maxima, sums, tokens, scale)
    tl.store(maximum + row, best)
    tl.store(sum_exp + row, tl.where(best == float("inf"), float("nan"), total))
    tl.store(token + row, vocab_start + winner.to(tl.int64))


def top1_partial(
    logits_shard: Tensor, vocab_start: int, *, temperature: float = 1.0, suppress_token: int = -1
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
        partials = launch_tile_statistics(rows, suppress_token - vocab_start, scale)
        partial_merge_tiles_kernel[(rows.count,)](
            *partials, scale, vocab_start, maximum, sum_exp, token,
            TILES=next_power_of_2(partials.num_tiles), num_warps=1,
        )  # fmt: skip
    return maximum, sum_exp, token
