"""The ops fused with the LM head: top1_confidence and sample_tokens of hidden @ weight^T + bias.

The loss is in linear_loss.py: of all this it shares only the product of one tile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dmax_kernels.triton.launch import device_of, row_view
from dmax_kernels.triton.linear_loss import linear_oput_loss, linear_oput_loss_backward
from dmax_kernels.triton.linear_rows import linear_statistics
from dmax_kernels.triton.sample import merge_samples
from dmax_kernels.triton.stats import NO_ID, Partials, softmax_scale
from dmax_kernels.triton.top1 import merge_top1

__all__ = [
    "linear_oput_loss",
    "linear_oput_loss_backward",
    "linear_sample_tokens",
    "linear_top1_confidence",
]


def linear_top1_confidence(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float = 1.0,
    suppress_token: int = -1,
) -> tuple[Tensor, Tensor]:
    shape, device = hidden.shape[:-1], hidden.device
    token = torch.empty(shape, dtype=torch.int64, device=device)
    confidence = torch.empty(shape, dtype=torch.float32, device=device)
    if token.numel() == 0:
        return token, confidence
    bias = None if bias is None else bias.contiguous()
    with device_of(hidden):
        for span, partials in linear_statistics(
            row_view(hidden), row_view(weight), bias, temperature, suppress_token
        ):
            merge_top1(
                Partials(*partials[:3], partials.num_groups), softmax_scale(temperature),
                token.view(-1)[span], confidence.view(-1)[span],
            )
    return token, confidence


@triton.jit(do_not_specialize=["num_groups"])
def linear_sample_merge_kernel(
    partial_max, partial_sum, partial_token, partial_score, partial_value, num_groups, scale,
    out_token, out_probability, GROUPS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    groups = tl.arange(0, GROUPS)
    valid = groups < num_groups
    at = row * num_groups + groups
    maxima = tl.load(partial_max + at, mask=valid, other=float("-inf"))
    sums = tl.load(partial_sum + at, mask=valid, other=0.0)
    tokens = tl.load(partial_token + at, mask=valid, other=NO_ID)
    scores = tl.load(partial_score + at, mask=valid, other=float("-inf"))
    values = tl.load(partial_value + at, mask=valid, other=float("-inf"))
    best, total, _, token = merge_samples(maxima, sums, scores, tokens, scale)
    value = tl.max(tl.where(tokens == token, values, float("-inf")), axis=0)
    tl.store(out_token + row, token.to(tl.int64))
    tl.store(out_probability + row, tl.exp2((value - best) * scale) / total)


def linear_sample_tokens(
    hidden: Tensor,
    weight: Tensor,
    seed: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    row_options: Tensor | None = None,
    suppress_token: int = -1,
    allowed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    raise RuntimeError("linear_sample_tokens: this draw is not in the Triton kernels yet")
