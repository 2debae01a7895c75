"""The ops fused with the LM head: top1_confidence, sample_tokens and token_logprobs of
hidden @ weight^T + bias.

The loss is in linear_loss.py: of all this it shares only the product of one tile.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from dmax_kernels.ops.logprobs import empty_logprobs
from dmax_kernels.triton.draw import Results, greedy_results, store_sample
from dmax_kernels.triton.launch import Rows, device_of, mask_of, next_power_of_2, row_view
from dmax_kernels.triton.linear_chunks import draw_of_chunks, float32_product, top1_of_chunks
from dmax_kernels.triton.linear_gradients import (
    linear_oput_loss_backward,
    linear_oput_loss_scale_,
    linear_oput_loss_sum,
)
from dmax_kernels.triton.linear_loss import linear_oput_loss, plain_products
from dmax_kernels.triton.linear_rows import linear_statistics, takes_chunks
from dmax_kernels.triton.sample import merge_samples
from dmax_kernels.triton.sample_filters import DrawOptions, sample_filtered
from dmax_kernels.triton.stats import NO_ID, Partials, softmax_scale
from dmax_kernels.triton.top1 import merge_top1

__all__ = [
    "linear_oput_loss",
    "linear_oput_loss_backward",
    "linear_oput_loss_scale_",
    "linear_oput_loss_sum",
    "linear_sample_tokens",
    "linear_token_logprobs",
    "linear_top1_confidence",
]


def linear_top1_confidence(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float = 1.0,
    suppress_token: int = -1,
    allowed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    shape, device = hidden.shape[:-1], hidden.device
    token = torch.empty(shape, dtype=torch.int64, device=device)
    confidence = torch.empty(shape, dtype=torch.float32, device=device)
    if token.numel() == 0:
        return token, confidence
    bias = None if bias is None else bias.contiguous()
    head = (row_view(hidden), row_view(weight), bias)
    # A mask's bits would not fit into the fused kernel's registers beside its accumulators
    if allowed is not None or takes_chunks(token.numel(), hidden.dtype, sampling=False):
        with plain_products(hidden):
            results = top1_of_chunks(*head, temperature, suppress_token, mask_of(allowed))
        return results[0].view(shape), results[1].view(shape)
    with device_of(hidden):
        for span, partials in linear_statistics(*head, temperature, suppress_token):
            merge_top1(
                Partials(*partials[:3], partials.num_groups), softmax_scale(temperature),
                token.view(-1)[span], confidence.view(-1)[span],
            )
    return token, confidence


@triton.jit(do_not_specialize=["num_groups"])
def linear_sample_merge_kernel(
    partial_max, partial_sum, partial_token, partial_score, partial_value, num_groups, scale,
    out_token, out_probability, out_top1, out_relative, GROUPS: tl.constexpr,
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
    store_sample(
        row, token, value, best, total, scale, out_token, out_probability, out_top1, out_relative
    )


# Rows whose logits are in memory at once where a filter needs them, in float32: 40 MB of 157,184
# tokens. The product then reads the weight once for 64 rows.
LOGIT_ROWS = 64


def stored_logits(
    hidden: Rows, weight: Rows, bias: Tensor | None
) -> Iterator[tuple[slice, Tensor]]:
    """(rows, their logits) by the library's product, LOGIT_ROWS rows at a time in one buffer."""
    flat = hidden.tensor.as_strided((hidden.count, hidden.width), (hidden.stride, 1))
    table = weight.tensor.as_strided((weight.count, weight.width), (weight.stride, 1))
    most = min(LOGIT_ROWS, hidden.count)
    buffer = flat.new_empty((most, weight.count), dtype=torch.float32)
    for first in range(0, hidden.count, LOGIT_ROWS):
        span = slice(first, min(first + LOGIT_ROWS, hidden.count))
        logits = buffer[: span.stop - first]
        float32_product(flat[span], table.t(), out=logits)
        if bias is not None:
            logits += bias
        yield span, logits


def draw_from_logits(
    hidden: Rows, weight: Rows, bias: Tensor | None, seed: Tensor, options: DrawOptions,
    suppress_token: int, results: Results,
) -> None:
    """Exact draws with filters."""
    options = options.in_rows()
    for span, logits in stored_logits(hidden, weight, bias):
        drawn = sample_filtered(
            Rows(logits, len(logits), weight.count, weight.count),
            seed if seed.dim() == 1 else seed[span], options.span(span), suppress_token,
            span.start,
        )
        for result, part in zip(results, drawn, strict=True):
            result[span] = part


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
    shape = hidden.shape[:-1]
    options = DrawOptions(temperature, top_k, top_p, min_p, row_options, allowed)
    filters = options.needs_filters(weight.shape[0])
    if temperature == 0 and not filters:
        greedy = linear_top1_confidence(hidden, weight, bias, suppress_token=suppress_token)
        return greedy_results(*greedy)
    results = Results.empty(shape.numel(), hidden.device)
    if shape.numel() == 0:
        return results.in_shape(shape)
    bias = None if bias is None else bias.contiguous()
    seed = seed.reshape(-1, 2).contiguous() if seed.dim() != 1 else seed.contiguous()
    head = (row_view(hidden), row_view(weight), bias)
    with plain_products(hidden):
        if filters:
            draw_from_logits(*head, seed, options, suppress_token, results)
            return results.in_shape(shape)
        if takes_chunks(shape.numel(), hidden.dtype, sampling=True):
            drawn = draw_of_chunks(*head, seed, temperature, suppress_token)
            return Results(*drawn).in_shape(shape)
        for span, partials in linear_statistics(*head, temperature, suppress_token, seed):
            linear_sample_merge_kernel[(span.stop - span.start,)](
                *partials, softmax_scale(temperature), *results.span(span),
                GROUPS=next_power_of_2(partials.num_groups), num_warps=4,
            )
    return results.in_shape(shape)


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float = 1.0,
    top_n: int = 0,
    ignore_index: int = -100,
    allowed: Tensor | None = None,
) -> tuple[Tensor, ...]:
    results = empty_logprobs(hidden, ids, top_n)
    count = hidden.shape[:-1].numel()
    if count == 0:
        return results
    per_row = ids.reshape(count) if ids.dim() < hidden.dim() else ids.reshape(count, -1)
    if allowed is not None:
        allowed = allowed.reshape(-1, allowed.shape[-1])
    flat = [each.view(count, *each.shape[hidden.dim() - 1 :]) for each in results]
    head = (row_view(hidden), row_view(weight), None if bias is None else bias.contiguous())
    with plain_products(hidden):
        for span, logits in stored_logits(*head):
            mask = allowed if allowed is None or len(allowed) == 1 else allowed[span]
            part = torch.ops.dmax.token_logprobs(
                logits, per_row[span], temperature=temperature, top_n=top_n,
                ignore_index=ignore_index, allowed=mask,
            )
            for result, mine in zip(flat, part, strict=True):
                result[span] = mine
    return results
