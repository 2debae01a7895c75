"""One vocabulary shard's part of a Gumbel-max sample."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dmax_kernels.triton.launch import device_of, next_power_of_2, row_view
from dmax_kernels.triton.sample import launch_tile_samples, load_and_merge_samples
from dmax_kernels.triton.stats import softmax_scale


@triton.jit(do_not_specialize=["num_tiles", "vocab_start"])
def sample_partial_merge_tiles_kernel(
    logits, row_stride, partial_max, partial_sum, partial_score, partial_token, num_tiles, scale,
    vocab_start, out_max, out_sum, out_token, out_score, out_weight, TILES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    best, total, score, token = load_and_merge_samples(
        partial_max, partial_sum, partial_score, partial_token, row, num_tiles, scale, TILES
    )
    x = tl.load(logits + row * row_stride + token).to(tl.float32)
    weight = tl.exp2((x - best) * scale)
    if best == float("-inf"):  # no mass
        total = 0.0
        weight = 0.0
    # NaN, +inf and all -inf: the maximum says it all
    finite = tl.abs(best) < float("inf")
    tl.store(out_max + row, best)
    tl.store(out_sum + row, total)
    tl.store(out_token + row, vocab_start + token.to(tl.int64))
    tl.store(out_score + row, tl.where(finite, score, best))
    tl.store(out_weight + row, weight)


def sample_partial(
    logits_shard: Tensor,
    seed: Tensor,
    vocab_start: int,
    *,
    temperature: float = 1.0,
    suppress_token: int = -1,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    f32, i64 = torch.float32, torch.int64
    out = tuple(
        torch.empty(logits_shard.shape[:-1], dtype=dtype, device=logits_shard.device)
        for dtype in (f32, f32, i64, f32, f32)
    )
    if out[0].numel() == 0:
        return out
    with device_of(logits_shard):
        rows = row_view(logits_shard)
        partials = launch_tile_samples(
            rows, seed, temperature, suppress_token - vocab_start, vocab_start
        )
        sample_partial_merge_tiles_kernel[(rows.count,)](
            rows.tensor, rows.stride, *partials, softmax_scale(temperature), vocab_start, *out,
            TILES=next_power_of_2(partials.num_tiles), num_warps=1,
        )  # fmt: skip
    return out
