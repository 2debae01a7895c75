"""Eqs. 8-10: the mix of token and mask embeddings, rescaled to the mix of their norms."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dmax_kernels.triton import checks
from dmax_kernels.triton.launch import Rows, device_of, next_power_of_2, row_view

# One program per position: 4 warps hold 1,024 of D at 8 elements per thread
CHUNK = 1024


def chunk_of(dim: int) -> int:
    return min(next_power_of_2(dim), CHUNK)


@triton.jit
def load_row(embedding, row_stride, token, vocab, at, dim):
    """float32 e(token) [chunk]; NaN for an id outside the vocabulary, which is not read."""
    known = (token >= 0) & (token < vocab)
    inside = at < dim
    e = tl.load(embedding + token * row_stride + at, mask=inside & known, other=0.0)
    return tl.where(known | (inside == 0), e.to(tl.float32), float("nan"))


@triton.jit
def mask_share(confidence, position, K: tl.constexpr):
    """Residual mass max(1 - sum p, 0) of the mask embedding; a NaN stays."""
    total = 0.0
    for i in tl.static_range(K):
        total += tl.load(confidence + position * K + i)
    rest = 1.0 - total
    return tl.where(rest < 0.0, 0.0, rest)


@triton.jit
def mix_chunk(
    embedding, row_stride, token, confidence, position, e_mask, share, vocab, at, dim,
    K: tl.constexpr,
):  # fmt: skip
    """sum_k p_k e(y_k) + r e(mask) over one chunk of D."""
    mix = share * e_mask
    for i in tl.static_range(K):
        p = tl.load(confidence + position * K + i)
        y = tl.load(token + position * K + i).to(tl.int64)
        mix += p * load_row(embedding, row_stride, y, vocab, at, dim)
    return mix


@triton.jit
def mix_norms(
    embedding, row_stride, token, confidence, position, mask_token_id, share, vocab, dim,
    K: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """(|s|, |e(mask)|, target = sum_k p_k |e(y_k)| + r |e(mask)|) of one position."""
    mask_square = tl.zeros([CHUNK], tl.float32)
    mix_square = tl.zeros([CHUNK], tl.float32)
    for start in range(0, dim, CHUNK):
        at = start + tl.arange(0, CHUNK)
        e_mask = load_row(embedding, row_stride, mask_token_id, vocab, at, dim)
        mix = mix_chunk(
            embedding, row_stride, token, confidence, position, e_mask, share, vocab, at, dim, K
        )
        mask_square += e_mask * e_mask
        mix_square += mix * mix
    mask_norm = tl.sqrt(tl.sum(mask_square, axis=0))
    target = share * mask_norm
    for i in tl.static_range(K):
        p = tl.load(confidence + position * K + i)
        target += p * token_norm(embedding, row_stride, token, position, i, vocab, dim, K, CHUNK)
    return tl.sqrt(tl.sum(mix_square, axis=0)), mask_norm, target


@triton.jit
def token_norm(
    embedding, row_stride, token, position, i, vocab, dim, K: tl.constexpr, CHUNK: tl.constexpr
):
    y = tl.load(token + position * K + i).to(tl.int64)
    square = tl.zeros([CHUNK], tl.float32)
    for start in range(0, dim, CHUNK):
        at = start + tl.arange(0, CHUNK)
        e = load_row(embedding, row_stride, y, vocab, at, dim)
        square += e * e
    return tl.sqrt(tl.sum(square, axis=0))


@triton.jit
def write_hybrid(
    embedding, row_stride, token, confidence, position, mask_token_id, vocab, dim, out,
    K: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    share = mask_share(confidence, position, K)
    norm, _, target = mix_norms(
        embedding, row_stride, token, confidence, position, mask_token_id, share, vocab, dim,
        K, CHUNK,
    )  # fmt: skip
    scale = tl.where(norm == 0.0, 0.0, tl.div_rn(target, tl.where(norm == 0.0, 1.0, norm)))
    for start in range(0, dim, CHUNK):
        at = start + tl.arange(0, CHUNK)
        e_mask = load_row(embedding, row_stride, mask_token_id, vocab, at, dim)
        mix = mix_chunk(
            embedding, row_stride, token, confidence, position, e_mask, share, vocab, at, dim, K
        )
        tl.store(out + at, (mix * scale).to(out.dtype.element_ty), mask=at < dim)


@triton.jit
def copy_row(embedding, row_stride, token, vocab, dim, out, CHUNK: tl.constexpr):
    for start in range(0, dim, CHUNK):
        at = start + tl.arange(0, CHUNK)
        e = load_row(embedding, row_stride, token, vocab, at, dim)
        tl.store(out + at, e.to(out.dtype.element_ty), mask=at < dim)


@triton.jit(do_not_specialize=["mask_token_id"])
def hybrid_embedding_kernel(
    embedding, row_stride, token, confidence, masked, mask_token_id, vocab, dim, out,
    K: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    position = tl.program_id(0).to(tl.int64)
    mask_token = mask_token_id.to(tl.int64)
    if tl.load(masked + position):
        copy_row(embedding, row_stride, mask_token, vocab, dim, out + position * dim, CHUNK)
    else:
        write_hybrid(
            embedding, row_stride, token, confidence, position, mask_token, vocab, dim,
            out + position * dim, K, CHUNK,
        )  # fmt: skip


def hybrid_embedding(
    embedding: Tensor, token: Tensor, confidence: Tensor, masked: Tensor, mask_token_id: int
) -> Tensor:
    k = checks.check_hybrid_embedding(embedding, token, confidence, masked, mask_token_id)
    vocab, dim = embedding.shape
    out = torch.empty((*masked.shape, dim), dtype=embedding.dtype, device=embedding.device)
    if out.numel() == 0:
        return out
    rows = row_view(embedding)
    with device_of(embedding):
        hybrid_embedding_kernel[(masked.numel(),)](
            rows.tensor, rows.stride, token.contiguous(), confidence.contiguous(),
            masked.contiguous(), mask_token_id, vocab, dim, out,
            K=k, CHUNK=chunk_of(dim), num_warps=4,
        )  # fmt: skip
    return out
