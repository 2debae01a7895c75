"""hidden @ weight^T by the library's matrix product, a chunk of the vocabulary at a time.

This replaces the fused kernel of linear_rows.py at shapes where cuBLAS's rate is worth writing the
logits out once, in float32, into a buffer of at most CHUNK_BYTES. A chunk is a shard of the
vocabulary: the ops over shards reduce it, and merge the chunks' results.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from dmax_kernels.triton.launch import Mask, Rows

CHUNK_TOKENS = 1024  # a multiple of which a chunk has
# Few and large chunks, since each costs some launches: see bench/results/gpu-h100-tried.md
CHUNK_BYTES = 256 << 20


def float32_product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b with float32 sums, never rounded to the inputs' dtype.

    Under autocast pass `out`: that form is not on autocast's list, which would make the product of
    two float32 tensors 16 bits wide.
    """
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    return torch.mm(a.float(), b.float(), out=out)  # the interpreter's CPU has no such product


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b with float32 sums, in the product's own epilogue."""
    if a.is_cuda and a.dtype != torch.float32:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        torch.addmm(total, a.float(), b.float(), out=total)


def logit_chunks(
    hidden: Rows, weight: Rows, bias: Tensor | None
) -> Iterator[tuple[int, Tensor]]:
    """(first token, logits [rows, tokens]) of every chunk; the next one overwrites them."""
    flat = hidden.tensor.as_strided((hidden.count, hidden.width), (hidden.stride, 1))
    table = weight.tensor.as_strided((weight.count, weight.width), (weight.stride, 1))
    most = max(1, CHUNK_BYTES // (4 * CHUNK_TOKENS * hidden.count))
    tokens = min(most, -(-weight.count // CHUNK_TOKENS)) * CHUNK_TOKENS
    buffer = flat.new_empty((hidden.count, tokens), dtype=torch.float32)
    for first in range(0, weight.count, tokens):
        part = slice(first, min(first + tokens, weight.count))
        logits = buffer[:, : part.stop - first]
        float32_product(flat, table[part].t(), out=logits)
        if bias is not None:
            logits += bias[part]
        yield first, logits


def top1_of_chunks(
    hidden: Rows, weight: Rows, bias: Tensor | None, temperature: float, suppress_token: int,
    mask: Mask,
) -> tuple[Tensor, Tensor]:
    """(token, confidence) [rows]."""
    found = []
    for first, logits in logit_chunks(hidden, weight, bias):
        words = None if mask.words is None else mask.words[:, first // 32 :]
        if words is not None:
            words = words[:, : -(-logits.shape[1] // 32)]
        found.append(
            torch.ops.dmax.top1_partial(
                logits, first, temperature=temperature, suppress_token=suppress_token, allowed=words
            )
        )
    parts = map(torch.stack, zip(*found, strict=True))
    return torch.ops.dmax.top1_merge(*parts, temperature=temperature)


def draw_of_chunks(
    hidden: Rows, weight: Rows, bias: Tensor | None, seed: Tensor, temperature: float,
    suppress_token: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """sample_tokens' results [rows]."""
    found = [
        torch.ops.dmax.sample_partial(
            logits, seed, first, temperature=temperature, suppress_token=suppress_token
        )
        for first, logits in logit_chunks(hidden, weight, bias)
    ]
    parts = [torch.stack(each) for each in zip(*found, strict=True)]
    _, top1 = torch.ops.dmax.top1_merge(*parts[:3], temperature=temperature)
    token, probability = torch.ops.dmax.sample_merge(*parts, temperature=temperature)
    return token, probability, top1, (probability / top1).minimum(top1)
