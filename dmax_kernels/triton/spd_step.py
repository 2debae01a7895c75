"""One step of Soft Parallel Decoding in place: top-1, decisions, then the next step's inputs.

Every launch is on the device's stream, and none depends on a value read by the host. All of them
skip rows that had converged: the logits of those are not read.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dmax_kernels.ops.spd_step import SEMANTICS
from dmax_kernels.triton.embedding import chunk_of, copy_row, write_hybrid
from dmax_kernels.triton.launch import device_of, mask_of, next_power_of_2, row_view
from dmax_kernels.triton.promote import passes_threshold, promotable
from dmax_kernels.triton.top1 import top1_of_rows
from dmax_kernels.triton.topk import topk_of_rows

# What a position's next input embedding is
KEEP = tl.constexpr(0)
MASK = tl.constexpr(1)
HYBRID = tl.constexpr(2)
HARD = tl.constexpr(3)

SETTLED = tl.constexpr(SEMANTICS.index("settled"))
RELEASED = tl.constexpr(SEMANTICS.index("released"))


@triton.jit(do_not_specialize=["mask_token_id", "block"])
def decide_kernel(
    top_tokens, top_confidences, editable, masked, token, confidence, converged, step,
    mask_token_id, tau_dec, tau_acc, thresholds, source, block,
    SEMANTICS_CODE: tl.constexpr, HAS_THRESHOLDS: tl.constexpr, TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Steps 2-4 for one row of the batch; source [B, K] says how to embed each position."""
    inclusive: tl.constexpr = SEMANTICS_CODE == RELEASED
    row = tl.program_id(0).to(tl.int64)
    position = tl.arange(0, BLOCK)
    inside = position < block
    at = row * block + position
    if tl.load(converged + row):
        tl.store(source + at, tl.zeros([BLOCK], tl.int8) + KEEP, mask=inside)
        return
    if HAS_THRESHOLDS:
        tau_dec = tl.load(thresholds + row * 2)
        tau_acc = tl.load(thresholds + row * 2 + 1)
    is_editable = tl.load(editable + at, mask=inside, other=0) != 0
    is_masked = tl.load(masked + at, mask=inside, other=0) != 0
    old_token = tl.load(token + at, mask=inside, other=0)
    y = tl.load(top_tokens + at * TOP_K, mask=inside, other=0)
    c = tl.load(top_confidences + at * TOP_K, mask=inside, other=0.0)
    steps = tl.load(step + row)

    # Promote the confident prefix of the masked positions
    fails = is_masked & (passes_threshold(c, tau_dec, inclusive) == 0)
    first_masked = tl.min(tl.where(is_masked, position, block), axis=0)
    first_failure = tl.min(tl.where(fails, position, block), axis=0)
    promoted = promotable(position, is_masked, first_masked, first_failure)

    # Converged: consistent with the last step, or confident everywhere
    unsure = is_editable & (passes_threshold(c, tau_acc, inclusive) == 0)
    confident = tl.max(unsure.to(tl.int32), axis=0) == 0
    num_editable = tl.sum(is_editable.to(tl.int32), axis=0)
    if SEMANTICS_CODE == RELEASED:
        updated = promoted | (is_editable & (is_masked == 0))
        changed = tl.max((updated & (y != old_token)).to(tl.int32), axis=0) > 0
        done = confident | (changed == 0)
        new_token = tl.where(updated, y, old_token)
        still_masked = is_editable & (new_token == mask_token_id)
        keep = done & (num_editable > 0)
    else:
        differs = y != old_token
        if SEMANTICS_CODE == SETTLED:
            # A prediction at a mask position is no decision yet, repeated or not
            differs = differs | is_masked
        changed = tl.max((is_editable & differs).to(tl.int32), axis=0) > 0
        done = confident | ((steps >= 1) & (changed == 0))
        new_token = tl.where(is_editable, y, old_token)
        # The commit takes every position: no mask is left behind (Algorithm 1, line 13)
        still_masked = is_masked & (promoted == 0) & (done == 0)
        keep = num_editable < 0  # never

    tl.store(token + at, new_token, mask=inside)
    tl.store(confidence + at, c, mask=inside & is_editable)
    tl.store(masked + at, still_masked, mask=inside)
    tl.store(converged + row, done)
    tl.store(step + row, steps + 1)
    embed = tl.where(still_masked, MASK, tl.where(is_editable, HYBRID, HARD))
    tl.store(source + at, tl.where(keep, KEEP, embed).to(tl.int8), mask=inside)


@triton.jit(do_not_specialize=["mask_token_id"])
def embed_kernel(
    embedding, row_stride, source, token, top_tokens, top_confidences, mask_token_id, vocab, dim,
    inputs_embeds, TOP_K: tl.constexpr, CHUNK: tl.constexpr,
):
    """Step 5 for one position."""
    position = tl.program_id(0).to(tl.int64)
    how = tl.load(source + position).to(tl.int32)
    out = inputs_embeds + position * dim
    mask_token = mask_token_id.to(tl.int64)
    if how == HYBRID:
        write_hybrid(
            embedding, row_stride, top_tokens, top_confidences, position, mask_token, vocab, dim,
            out, TOP_K, CHUNK,
        )
    elif how != KEEP:
        own_token = tl.load(token + position)
        copy_row(
            embedding, row_stride, tl.where(how == MASK, mask_token, own_token), vocab, dim,
            out, CHUNK,
        )


def spd_step_(
    logits: Tensor,
    embedding: Tensor,
    editable: Tensor,
    masked: Tensor,
    token: Tensor,
    confidence: Tensor,
    converged: Tensor,
    step: Tensor,
    inputs_embeds: Tensor,
    mask_token_id: int,
    tau_dec: float,
    tau_acc: float,
    *,
    semantics: int = 0,
    top_k: int = 1,
    temperature: float = 1.0,
    suppress_token: int = -1,
    thresholds: Tensor | None = None,
    allowed: Tensor | None = None,
) -> None:
    batch, block, vocab = logits.shape
    if batch == 0:
        return
    rows, embedding_rows = row_view(logits), row_view(embedding)
    source = torch.empty((batch, block), dtype=torch.int8, device=logits.device)
    with device_of(logits):
        mask = mask_of(allowed)
        if top_k == 1:
            top = top1_of_rows(rows, temperature, suppress_token, converged, block, mask)
        else:
            top = topk_of_rows(rows, top_k, temperature, suppress_token, converged, block, mask)
        decide_kernel[(batch,)](
            *top, editable, masked, token, confidence, converged, step,
            mask_token_id, float(tau_dec), float(tau_acc),
            None if thresholds is None else thresholds.contiguous(), source, block,
            SEMANTICS_CODE=semantics, HAS_THRESHOLDS=thresholds is not None, TOP_K=top_k,
            BLOCK=next_power_of_2(block), num_warps=1 if block <= 64 else 4,
        )
        embed_kernel[(batch * block,)](
            embedding_rows.tensor, embedding_rows.stride, source, token, *top,
            mask_token_id, vocab, embedding.shape[1], inputs_embeds,
            TOP_K=top_k, CHUNK=chunk_of(embedding.shape[1]), num_warps=4,
        )
