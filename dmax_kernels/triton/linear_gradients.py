"""The gradients of linear_oput_loss, from single losses or together with their weighted sum.

With R rows of both passes there are four products of 2 R V D operations each: the logits in the
forward pass and again in the backward pass, the gradient of the hidden states, and that of the
weight. At 2 x 4,096 rows, V = 157,184 and D = 2,048 that is 21.1 TFLOP. The logits are computed
twice because a token's upstream gradient is only known when the backward pass begins.
linear_oput_loss_sum knows it from the start: it keeps the logits of the first rows, KEPT_BYTES of
them in float32, and computes only those of the other rows twice. Up to 1,707 rows at this V that
leaves three products. (Blocks of rows would leave three for any R, but each block would read and
write a float32 gradient of the weight: 2.6 GB, in which time 1,024 rows' logits are computed.)

The backward pass goes through the vocabulary in chunks of C tokens (16,384 at this R). A Triton
kernel writes the gradient of the chunk's logits [R, C] in the inputs' dtype, and two library
products with float32 sums follow. One is the chunk's gradient of the weight: it is complete, over
all rows, and is rounded and written once, so that no float32 [V, D] exists, no atomics are needed,
and the error does not depend on C. The other is added to the hidden states' float32 [R, D]. The
workspace at these sizes is 0.5 GB beside the logits that are kept. An H100 takes 32 ms for it all.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dmax_kernels.triton.launch import Rows, device_of, row_view
from dmax_kernels.triton.linear_chunks import add_product, float32_product
from dmax_kernels.triton.linear_loss import linear_oput_loss, plain_products
from dmax_kernels.triton.linear_rows import choose_linear_tiles, logits_tile, precision_of
from dmax_kernels.triton.loss import grad_of_logits, pass_loss
from dmax_kernels.triton.stats import softmax_scale

# Elements of one chunk of logit gradients, and the most and the fewest tokens of a chunk
CHUNK_ELEMENTS = 1 << 27
MOST_CHUNK_TOKENS = 16384
LEAST_CHUNK_TOKENS = 2048
# Logits that linear_oput_loss_sum keeps
KEPT_BYTES = 1 << 30
# Elements per program of the kernels that read stored numbers. Not timed yet
KEPT_TILE = 4096


@triton.jit(do_not_specialize=["num_rows", "first_token", "ignore_index"])
def logits_grad_kernel(
    hidden, weight, weight_stride, bias, target, grad_loss, logsumexp,
    num_rows, first_token, vocab, dim, ignore_index, temperature, inverse_temperature, scale,
    label_smoothing, z_loss, grad_logits, grad_stride,
    PRECISION: tl.constexpr, EVEN_K: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """grad_logits[row, id - first_token] of one tile; hidden rows lie dim apart."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N
    safe_row = tl.minimum(row, num_rows - 1).to(tl.int64)
    ids, x = logits_tile(
        hidden + safe_row * dim, weight, weight_stride, bias, first_token + column, vocab, dim, -1,
        PRECISION, EVEN_K, HAS_BIAS, BLOCK_M, BLOCK_N, BLOCK_K,
    )

    target_ids = tl.load(target + safe_row).to(tl.int64)
    lse = tl.load(logsumexp + safe_row)
    reference = lse * temperature
    g = tl.load(grad_loss + safe_row) * inverse_temperature
    grad = grad_of_logits(
        tl.exp2((x - reference[:, None]) * scale), ids[None, :] == target_ids[:, None], g[:, None],
        lse[:, None], vocab, label_smoothing, z_loss,
    )

    # Rows without a gradient: 0 where ignored, NaN where the target is no token
    known = (target_ids >= 0) & (target_ids < vocab)
    grad = tl.where(known[:, None], grad, float("nan"))
    grad = tl.where((target_ids != ignore_index)[:, None], grad, 0.0)
    at = grad_logits + safe_row[:, None] * grad_stride + (ids - first_token)[None, :]
    valid = (row < num_rows)[:, None] & (ids < vocab)[None, :]
    tl.store(at, grad.to(grad_logits.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["first_token", "num_tokens", "ignore_index"])
def kept_grad_kernel(
    logits, logits_stride, target, grad_loss, logsumexp, first_token, num_tokens, vocab,
    ignore_index, temperature, inverse_temperature, scale, label_smoothing, z_loss, grad_logits,
    grad_stride, TILE: tl.constexpr,
):
    """logits_grad_kernel's results from stored logits, those of first_token first: one tile of a
    row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    whole = (tl.program_id(1) + 1) * TILE <= num_tokens  # a mask would rule out 16-byte accesses
    target_id = tl.load(target + row).to(tl.int64)
    lse = tl.load(logsumexp + row)
    at = logits + row * logits_stride + column
    x = tl.load(at) if whole else tl.load(at, mask=column < num_tokens, other=float("-inf"))
    grad = grad_of_logits(
        tl.exp2((x - lse * temperature) * scale), first_token + column == target_id,
        tl.load(grad_loss + row) * inverse_temperature, lse, vocab, label_smoothing, z_loss,
    )
    known = (target_id >= 0) & (target_id < vocab)
    grad = tl.where(known, grad, float("nan"))
    grad = tl.where(target_id != ignore_index, grad, 0.0).to(grad_logits.dtype.element_ty)
    out = grad_logits + row * grad_stride + column
    if whole:
        tl.store(out, grad)
    else:
        tl.store(out, grad, mask=column < num_tokens)


@triton.jit(do_not_specialize=["count"])
def scale_kernel(values, count, factor, TILE: tl.constexpr):
    by = tl.load(factor)
    if by == 1.0:  # loss.backward()'s: nothing is read or written
        return
    tile = tl.program_id(0).to(tl.int64) * TILE
    at = values + tile + tl.arange(0, TILE)
    if tile + TILE <= count:
        tl.store(at, (tl.load(at).to(tl.float32) * by).to(values.dtype.element_ty))
    else:
        inside = tile + tl.arange(0, TILE) < count
        x = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        tl.store(at, (x * by).to(values.dtype.element_ty), mask=inside)


def write_logits_grad(
    hidden: Tensor, weight: Rows, bias: Tensor | None, target: Tensor, grad_loss: Tensor,
    logsumexp: Tensor, first_token: int, num_tokens: int, out: Tensor, ignore_index: int,
    label_smoothing: float, z_loss: float, temperature: float,
) -> None:
    """out[:, :num_tokens] := gradient of the logits of tokens first_token, first_token + 1, ..."""
    num_rows, dim = hidden.shape
    # The gradient needs registers beside the accumulators: the wide tile spills up to 656 bytes
    tiles = choose_linear_tiles(
        num_rows, num_tokens, hidden.dtype, hidden.device, wide=False
    )
    grid = (-(-num_rows // tiles.block_m), -(-num_tokens // tiles.block_n))
    logits_grad_kernel[grid](
        hidden, weight.tensor, weight.stride, bias, target, grad_loss, logsumexp,
        num_rows, first_token, weight.count, dim, ignore_index, float(temperature),
        1.0 / temperature, softmax_scale(temperature), float(label_smoothing), float(z_loss), out,
        out.stride(0),
        PRECISION=precision_of(hidden.dtype), EVEN_K=dim % tiles.block_k == 0,
        HAS_BIAS=bias is not None,
        BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_K=tiles.block_k,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )


def linear_oput_loss_backward(
    grad_masked: Tensor,
    grad_predicted: Tensor,
    hidden_masked: Tensor | None,
    hidden_predicted: Tensor | None,
    weight: Tensor,
    target: Tensor,
    logsumexp_masked: Tensor,
    logsumexp_predicted: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    temperature: float = 1.0,
    needs_masked: bool = True,
    needs_predicted: bool = True,
    needs_weight: bool = True,
    needs_bias: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    present = [h is not None for h in (hidden_masked, hidden_predicted)]
    with plain_products(weight):
        stacked = stacked_passes(hidden_masked, hidden_predicted, target, ignore_index)
        grad_loss, logsumexp = (
            torch.cat([t.reshape(-1) for t, there in zip(pair, present, strict=True) if there])
            for pair in ((grad_masked, grad_predicted), (logsumexp_masked, logsumexp_predicted))
        )
        return linear_gradients(
            stacked, weight, bias, grad_loss, logsumexp, None,
            Needed(needs_masked, needs_predicted, needs_weight, needs_bias and bias is not None),
            ignore_index, label_smoothing, z_loss, temperature,
        )


class StackedPasses(NamedTuple):
    """The rows of the given passes as one matrix; ignored ones are 0, as 0 times NaN is not."""

    hidden: Tensor  # [rows of all passes, D]
    target: Tensor  # [rows of all passes]
    shapes: list[torch.Size | None]  # of the passes' hidden states; None: not given


def stacked_passes(
    hidden_masked: Tensor | None, hidden_predicted: Tensor | None, target: Tensor,
    ignore_index: int,
) -> StackedPasses:
    passes = [hidden_masked, hidden_predicted]
    given = [h.reshape(target.numel(), h.shape[-1]) for h in passes if h is not None]
    ignored = (target == ignore_index).view(-1, 1)
    return StackedPasses(
        torch.cat([h.masked_fill(ignored, 0) for h in given]),
        target.reshape(-1).repeat(len(given)),
        [None if h is None else h.shape for h in passes],
    )


class Needed(NamedTuple):
    """Which gradients to compute."""

    masked: bool
    predicted: bool
    weight: bool
    bias: bool


def linear_gradients(
    stacked: StackedPasses, weight: Tensor, bias: Tensor | None, grad_loss: Tensor,
    logsumexp: Tensor, kept: Tensor | None, needed: Needed, ignore_index: int,
    label_smoothing: float, z_loss: float, temperature: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the hidden states, the weight and the bias; an empty one is not needed.

    ``kept``: the float32 logits [rows, V] of the first rows, with their bias.
    """
    vocab = weight.shape[0]
    hidden, target_ids, shapes = stacked

    def zeros(shape: tuple[int, ...] | None, wanted: bool) -> Tensor:
        size = shape if wanted and shape is not None else (0,)
        return torch.zeros(size, dtype=weight.dtype, device=weight.device)

    grad_weight = zeros(weight.shape, needed.weight)
    grad_bias = zeros((vocab,), needed.bias)
    grads_hidden = [
        zeros(shape, wanted) for shape, wanted in zip(shapes, needed[:2], strict=True)
    ]
    if hidden.numel() > 0:
        weight_rows = row_view(weight)
        bias_values = None if bias is None else bias.contiguous()
        num_kept = 0 if kept is None else len(kept)

        needs_hidden = any(grad.numel() > 0 for grad in grads_hidden)
        grad_hidden = hidden.new_zeros(hidden.shape if needs_hidden else (0,), dtype=torch.float32)
        chunk = CHUNK_ELEMENTS // len(hidden) // LEAST_CHUNK_TOKENS * LEAST_CHUNK_TOKENS
        chunk = min(vocab, max(LEAST_CHUNK_TOKENS, min(MOST_CHUNK_TOKENS, chunk)))
        # Rows at 16-byte steps, which the library's products want
        grad_logits = hidden.new_empty(len(hidden), -(-chunk // 8) * 8)
        for first in range(0, vocab, chunk):
            n = min(chunk, vocab - first)
            if num_kept > 0:
                kept_grad_kernel[(num_kept, -(-n // KEPT_TILE))](
                    kept[:, first:], kept.stride(0), target_ids, grad_loss, logsumexp, first, n,
                    vocab, ignore_index, float(temperature), 1.0 / temperature,
                    softmax_scale(temperature), float(label_smoothing), float(z_loss), grad_logits,
                    grad_logits.stride(0), TILE=KEPT_TILE, num_warps=4,
                )
            if num_kept < len(hidden):
                write_logits_grad(
                    hidden[num_kept:], weight_rows, bias_values, target_ids[num_kept:],
                    grad_loss[num_kept:], logsumexp[num_kept:], first, n, grad_logits[num_kept:],
                    ignore_index, label_smoothing, z_loss, temperature,
                )
            grad_chunk = grad_logits[:, :n]
            if needs_hidden:
                add_product(grad_hidden, grad_chunk, weight[first : first + n])
            if needed.weight:
                grad_weight[first : first + n] = float32_product(grad_chunk.t(), hidden)
            if needed.bias:
                grad_bias[first : first + n] = grad_chunk.sum(dim=0, dtype=torch.float32)
        if needs_hidden:
            given = sum(shape is not None for shape in shapes)
            rows = iter(grad_hidden.chunk(given))
            for shape, grad in zip(shapes, grads_hidden, strict=True):
                if shape is not None:
                    of_pass = next(rows)
                    if grad.numel():
                        grad.copy_(of_pass.view(shape))
    return *grads_hidden, grad_weight, grad_bias


def linear_oput_loss_sum(
    hidden_masked: Tensor | None,
    hidden_predicted: Tensor | None,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    factor_masked: Tensor | None = None,
    factor_predicted: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    temperature: float = 1.0,
    needs_masked: bool = True,
    needs_predicted: bool = True,
    needs_weight: bool = True,
    needs_bias: bool = True,
) -> tuple[Tensor, ...]:
    options = (ignore_index, label_smoothing, z_loss, temperature)
    vocab = weight.shape[0]
    with plain_products(weight):
        stacked = stacked_passes(hidden_masked, hidden_predicted, target, ignore_index)
        hidden = stacked.hidden
        num_kept = min(len(hidden), KEPT_BYTES // (4 * vocab))
        # Rows at 16-byte steps, which the library's products want
        kept = hidden.new_empty((num_kept, -(-vocab // 4) * 4), dtype=torch.float32)[:, :vocab]
        losses, logsumexps = [], []
        if num_kept > 0:
            float32_product(hidden[:num_kept], weight.t(), out=kept)
            if bias is not None:
                kept += bias
            result = pass_loss(
                Rows(kept, num_kept, vocab, kept.stride(0)), stacked.target[:num_kept], *options
            )
            losses.append(result.loss)
            logsumexps.append(result.logsumexp)
        if num_kept < len(hidden):
            loss, _, logsumexp, _ = linear_oput_loss(
                hidden[num_kept:], None, weight, stacked.target[num_kept:], bias,
                ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss,
                temperature=temperature,
            )
            losses.append(loss)
            logsumexps.append(logsumexp)
        loss, logsumexp = (
            torch.cat(parts) if parts else hidden.new_empty(0, dtype=torch.float32)
            for parts in (losses, logsumexps)
        )
        factors = torch.cat(
            [
                loss.new_ones(target.numel()) if factor is None else factor.reshape(-1)
                for factor, shape in zip((factor_masked, factor_predicted), stacked.shapes,
                                         strict=True)
                if shape is not None
            ]
        )
        grads = linear_gradients(
            stacked, weight, bias, factors, logsumexp, kept,
            Needed(needs_masked, needs_predicted, needs_weight, needs_bias and bias is not None),
            *options,
        )
        given = sum(shape is not None for shape in stacked.shapes)
        by_pass = iter(logsumexp.chunk(given) if len(logsumexp) else [logsumexp] * given)
        logsumexps = [
            logsumexp.new_empty(0) if shape is None else next(by_pass).clone().view(target.shape)
            for shape in stacked.shapes
        ]
        sums = (loss * factors).view(given, target.numel()).sum(1)
        absent = [shape is None for shape in stacked.shapes]
        if any(absent):
            sums = torch.cat([sums.new_zeros(1), sums] if absent[0] else [sums, sums.new_zeros(1)])
        return sums.sum(), sums, *logsumexps, *grads


def linear_oput_loss_scale_(grad: Tensor, factor: Tensor) -> None:
    if grad.numel() == 0:
        return
    with device_of(grad):
        scale_kernel[(-(-grad.numel() // KEPT_TILE),)](
            grad, grad.numel(), factor, TILE=KEPT_TILE, num_warps=4
        )
