"""Eqs. 8-10: the mix of token and mask embeddings, rescaled to the mix of their norms."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dmax_kernels.triton.launch import device_of, next_power_of_2, row_view

# Elements of D that a program holds at once: 8 per thread of 4 warps
MOST_CHUNK = 1024


def chunk_of(dim: int) -> int:
    return min(next_power_of_2(dim), MOST_CHUNK)


@triton.jit
def load_row(embedding, row_stride, token, vocab, at, dim):
    """float32 e(token) [chunk]; NaN for an id outside the vocabulary, which is not read."""
    known = (token >= 0) & (token < vocab)
    absent = tl.where(known, 0.0, float("nan"))
    e = tl.load(embedding + token * row_stride + at, mask=at < tl.where(known, dim, 0), other=0.0)
    return e.to(tl.float32) + absent


@triton.jit
def mask_share(confidence, position, K: tl.constexpr):
    """Residual mass max(1 - sum p, 0) of the mask embedding; a NaN stays NaN."""
    total = 0.0
    for i in tl.static_range(K):
        total += tl.load(confidence + position * K + i)
    rest = 1.0 - total
    return tl.where(rest < 0.0, 0.0, rest)


@triton.jit
def mix_chunk(
    embedding, row_stride, token, confidence, position, e_mask, share, vocab, at, dim,
    K: tl.constexpr,
):
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
):
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
):
    share = mask_share(confidence, position, K)
    norm, _, target = mix_norms(
        embedding, row_stride, token, confidence, position, mask_token_id, share, vocab, dim,
        K, CHUNK,
    )
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
):
    position = tl.program_id(0).to(tl.int64)
    mask_token = mask_token_id.to(tl.int64)
    if tl.load(masked + position):
        copy_row(embedding, row_stride, mask_token, vocab, dim, out + position * dim, CHUNK)
    else:
        write_hybrid(
            embedding, row_stride, token, confidence, position, mask_token, vocab, dim,
            out + position * dim, K, CHUNK,
        )


def hybrid_embedding(
    embedding: Tensor, token: Tensor, confidence: Tensor, masked: Tensor, mask_token_id: int
) -> Tensor:
    vocab, dim = embedding.shape
    out = torch.empty((*masked.shape, dim), dtype=embedding.dtype, device=embedding.device)
    if out.numel() == 0:
        return out
    rows = row_view(embedding)
    k = token.numel() // masked.numel()
    with device_of(embedding):
        hybrid_embedding_kernel[(masked.numel(),)](
            rows.tensor, rows.stride, token.contiguous(), confidence.contiguous(),
            masked.contiguous(), mask_token_id, vocab, dim, out,
            K=k, CHUNK=chunk_of(dim), num_warps=4,
        )
    return out


# ---- Gradient. With g the output's gradient, s the mix, a = target / |s| and u = s / |s|:
#   d s = a (g - u (u.g)), d target = u.g,
#   d e(y_j) = p_j (d s + d target e(y_j) / |e(y_j)|), d e(mask) likewise with the residual,
#   d p_j = d s . (e(y_j) - [r > 0] e(mask)) + d target (|e(y_j)| - [r > 0] |e(mask)|).
# Three launches without float atomics: each position's d s, then partial sums for the mask
# embedding, to which every position adds, then each table row's sum in the order of positions.

MASK_SPAN = 32  # positions per partial sum of the mask embedding's gradient


@triton.jit
def dot_row(embedding, row_stride, token, vector, vocab, dim, CHUNK: tl.constexpr):
    total = tl.zeros([CHUNK], tl.float32)
    for start in range(0, dim, CHUNK):
        at = start + tl.arange(0, CHUNK)
        v = tl.load(vector + at, mask=at < dim, other=0.0).to(tl.float32)
        total += v * load_row(embedding, row_stride, token, vocab, at, dim)
    return tl.sum(total, axis=0)


@triton.jit(do_not_specialize=["mask_token_id"])
def position_grad_kernel(
    grad_output, embedding, row_stride, token, confidence, masked, mask_token_id, vocab, dim,
    grad_mix, mask_weight, mask_pull, token_pull, grad_confidence,
    K: tl.constexpr, CHUNK: tl.constexpr,
):
    """d s [D] of a position, d p, and its part (weight * d s + pull * e) of the table's rows."""
    position = tl.program_id(0).to(tl.int64)
    mask_token = mask_token_id.to(tl.int64)
    g_row = grad_output + position * dim
    ds_row = grad_mix + position * dim

    # Where masked, e(mask) itself is the output
    if tl.load(masked + position):
        for start in range(0, dim, CHUNK):
            at = start + tl.arange(0, CHUNK)
            g = tl.load(g_row + at, mask=at < dim, other=0.0)
            tl.store(ds_row + at, g.to(tl.float32), mask=at < dim)
        tl.store(mask_weight + position, 1.0)
        tl.store(mask_pull + position, 0.0)
        for i in tl.static_range(K):
            tl.store(token_pull + position * K + i, 0.0)
            tl.store(grad_confidence + position * K + i, 0.0)
        return

    share = mask_share(confidence, position, K)
    norm, mask_norm, target = mix_norms(
        embedding, row_stride, token, confidence, position, mask_token, share, vocab, dim, K, CHUNK
    )
    inverse = tl.where(norm == 0.0, 0.0, 1.0 / tl.where(norm == 0.0, 1.0, norm))

    # u.g, then d s
    u_dot_g = tl.zeros([CHUNK], tl.float32)
    for start in range(0, dim, CHUNK):
        at = start + tl.arange(0, CHUNK)
        e_mask = load_row(embedding, row_stride, mask_token, vocab, at, dim)
        mix = mix_chunk(
            embedding, row_stride, token, confidence, position, e_mask, share, vocab, at, dim, K
        )
        u_dot_g += mix * inverse * tl.load(g_row + at, mask=at < dim, other=0.0).to(tl.float32)
    grad_target = tl.sum(u_dot_g, axis=0)
    for start in range(0, dim, CHUNK):
        at = start + tl.arange(0, CHUNK)
        e_mask = load_row(embedding, row_stride, mask_token, vocab, at, dim)
        mix = mix_chunk(
            embedding, row_stride, token, confidence, position, e_mask, share, vocab, at, dim, K
        )
        g = tl.load(g_row + at, mask=at < dim, other=0.0).to(tl.float32)
        ds = target * inverse * (g - mix * inverse * grad_target)
        tl.store(ds_row + at, ds, mask=at < dim)
    tl.debug_barrier()  # below, other threads of this program read what was stored

    # Weights in the table's rows, and d p
    mask_pull_here = tl.where(mask_norm == 0.0, 0.0, share * grad_target / mask_norm)
    tl.store(mask_weight + position, share)
    tl.store(mask_pull + position, mask_pull_here)
    mask_part = dot_row(embedding, row_stride, mask_token, ds_row, vocab, dim, CHUNK)
    mask_part = tl.where(share == 0.0, 0.0, mask_part + grad_target * mask_norm)
    for i in tl.static_range(K):
        y = tl.load(token + position * K + i).to(tl.int64)
        p = tl.load(confidence + position * K + i)
        e_norm = token_norm(embedding, row_stride, token, position, i, vocab, dim, K, CHUNK)
        pull = tl.where(e_norm == 0.0, 0.0, p * grad_target / e_norm)
        tl.store(token_pull + position * K + i, pull)
        token_part = dot_row(embedding, row_stride, y, ds_row, vocab, dim, CHUNK)
        token_part += grad_target * e_norm
        tl.store(grad_confidence + position * K + i, token_part - mask_part)


@triton.jit(do_not_specialize=["num_positions"])
def mask_grad_kernel(
    grad_mix, mask_weight, mask_pull, num_positions, dim, partial, partial_pull,
    SPAN: tl.constexpr, CHUNK: tl.constexpr,
):
    span = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    total = tl.zeros([CHUNK], tl.float32)
    pull = 0.0
    last = tl.minimum((span + 1) * SPAN, num_positions)
    for position in range(span * SPAN, last):
        ds = tl.load(grad_mix + position * dim + at, mask=at < dim, other=0.0)
        weight = tl.load(mask_weight + position)
        total += weight * ds
        pull += tl.load(mask_pull + position)
    tl.store(partial + span * dim + at, total, mask=at < dim)
    tl.store(partial_pull + span, pull)


@triton.jit(do_not_specialize=["num_slots", "num_spans"])
def table_grad_kernel(
    grad_mix, confidence, token_pull, partial, partial_pull, sorted_token, slot_of, num_slots,
    num_spans, embedding, row_stride, vocab, dim, grad_embedding,
    K: tl.constexpr, CHUNK: tl.constexpr,
):
    """The first of a token's slots sums them all. Slot num_slots is the mask token's."""
    first = tl.program_id(0).to(tl.int64)
    token = tl.load(sorted_token + first)
    if token == vocab:  # masked positions, and ids that are no token
        return
    if first > 0:  # noqa: SIM102 (`and` does not keep the load from being made)
        if tl.load(sorted_token + first - 1) == token:
            return
    at = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    total = tl.zeros([CHUNK], tl.float32)
    pull = 0.0
    place = first
    same_token = True
    while same_token:
        slot = tl.load(slot_of + place)
        if slot == num_slots:
            span_row = partial + at
            for span in range(0, num_spans):
                total += tl.load(span_row, mask=at < dim, other=0.0)
                pull += tl.load(partial_pull + span)
                span_row += dim
        else:
            ds = tl.load(grad_mix + (slot // K) * dim + at, mask=at < dim, other=0.0)
            total += tl.load(confidence + slot) * ds
            pull += tl.load(token_pull + slot)
        place += 1
        same_token = place <= num_slots
        if same_token:
            same_token = tl.load(sorted_token + place) == token
    total += pull * load_row(embedding, row_stride, token, vocab, at, dim)
    out = grad_embedding + token * dim + at
    tl.store(out, total.to(grad_embedding.dtype.element_ty), mask=at < dim)


def hybrid_embedding_backward(
    grad_output: Tensor,
    embedding: Tensor,
    token: Tensor,
    confidence: Tensor,
    masked: Tensor,
    mask_token_id: int,
) -> tuple[Tensor, Tensor]:
    vocab, dim = embedding.shape
    device = embedding.device
    grad_embedding = torch.zeros((vocab, dim), dtype=embedding.dtype, device=device)
    grad_confidence = torch.empty(confidence.shape, dtype=torch.float32, device=device)
    num_positions = masked.numel()
    if num_positions == 0:
        return grad_embedding, grad_confidence

    rows = row_view(embedding)
    token, confidence, masked = token.contiguous(), confidence.contiguous(), masked.contiguous()
    k = confidence.numel() // num_positions
    num_slots, num_spans = num_positions * k, -(-num_positions // MASK_SPAN)

    def scratch(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    grad_mix, partial = scratch(num_positions, dim), scratch(num_spans, dim)
    mask_weight, mask_pull = scratch(num_positions), scratch(num_positions)
    token_pull, partial_pull = scratch(num_slots), scratch(num_spans)
    chunk = chunk_of(dim)
    num_chunks = -(-dim // chunk)
    with device_of(embedding):
        position_grad_kernel[(num_positions,)](
            grad_output.contiguous(), rows.tensor, rows.stride, token, confidence, masked,
            mask_token_id, vocab, dim,
            grad_mix, mask_weight, mask_pull, token_pull, grad_confidence,
            K=k, CHUNK=chunk, num_warps=4,
        )
        mask_grad_kernel[(num_spans, num_chunks)](
            grad_mix, mask_weight, mask_pull, num_positions, dim, partial, partial_pull,
            SPAN=MASK_SPAN, CHUNK=chunk, num_warps=4,
        )
        # Slots by token, then by position (the sort is stable); `vocab` stands for no token
        slots = token.reshape(num_positions, k).long()
        none = masked.reshape(-1, 1) | (slots < 0) | (slots >= vocab)
        slots = slots.masked_fill(none, vocab).reshape(-1)
        slots = torch.cat([slots, slots.new_full((1,), mask_token_id)])
        sorted_token, slot_of = torch.sort(slots, stable=True)
        table_grad_kernel[(num_slots + 1, num_chunks)](
            grad_mix, confidence, token_pull, partial, partial_pull, sorted_token, slot_of,
            num_slots, num_spans, rows.tensor, rows.stride, vocab, dim, grad_embedding,
            K=k, CHUNK=chunk, num_warps=4,
        )
    return grad_embedding, grad_confidence
