"""One step of Soft Parallel Decoding: Algorithm 1, lines 4-12, on static buffers."""

from typing import Any

import torch
from torch import Tensor

from dmax_kernels.ops.spd_step import SEMANTICS
from dmax_kernels.reference.embedding import hybrid_embedding
from dmax_kernels.reference.promote import prefix_promote
from dmax_kernels.reference.top1 import top1_confidence, topk_confidence


def spd_step_(
    logits: Tensor,
    embedding: Tensor,
    *,
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
    semantics: str = "settled",
    top_k: int = 1,
    temperature: float = 1.0,
    suppress_token: int = -1,
    thresholds: Tensor | None = None,
    **visibility: Any,
) -> None:
    if logits.dim() != 3 or logits.shape[1] < 1:
        raise RuntimeError(
            f"spd_step_: logits must be [B, K, V] with K >= 1, got {list(logits.shape)}"
        )
    if semantics not in SEMANTICS:
        raise ValueError(f"spd_step_: semantics must be one of {SEMANTICS}, got {semantics!r}")
    released = semantics == "released"
    decode: Tensor | float = tau_dec
    accept: Tensor | float = tau_acc
    if thresholds is not None:
        decode, accept = thresholds[:, 0:1], thresholds[:, 1:2]
    active = ~converged.unsqueeze(-1)  # [B, 1]

    # Top-1 of every position, top-k where the hybrid embedding asks for it
    options = {"temperature": temperature, "suppress_token": suppress_token, **visibility}
    y, c = top1_confidence(logits, **options)
    tokens_k, confidences_k = y.unsqueeze(-1), c.unsqueeze(-1)
    if top_k > 1:
        tokens_k, confidences_k = topk_confidence(logits, top_k, **options)

    # Promotion: the confident prefix of the masked positions
    promoted = prefix_promote(c, masked, decode, inclusive=released)

    # Convergence, row by row: consistency or confidence
    sure = c >= accept if released else c > accept
    confident = (sure | ~editable).all(dim=-1)
    if released:
        updated = promoted | (editable & ~masked)
        consistent = ~(updated & (y != token)).any(dim=-1)
        next_token = torch.where(updated, y, token)
        next_masked = editable & (next_token == mask_token_id)
    else:
        repeated = y == token
        if semantics == "settled":  # a prediction at a mask is no decision yet, repeated or not
            repeated &= ~masked
        consistent = (step >= 1) & (repeated | ~editable).all(dim=-1)
        next_token = torch.where(editable, y, token)
        next_masked = masked & ~promoted
    nothing_to_decode = ~editable.any(dim=-1)
    now_converged = consistent | confident | nothing_to_decode
    if not released:  # line 13: the commit takes every position, so no mask is left
        next_masked = next_masked & ~now_converged.unsqueeze(-1)

    # Inputs of the next forward pass
    hybrid = hybrid_embedding(embedding, tokens_k, confidences_k, next_masked, mask_token_id)
    hard = embedding[next_token]
    embeds = torch.where((editable | next_masked).unsqueeze(-1), hybrid, hard)
    keep = ~active | (now_converged & ~nothing_to_decode).unsqueeze(-1) if released else ~active

    # A row that had converged before this step keeps all of its state
    inputs_embeds.copy_(torch.where(keep.unsqueeze(-1), inputs_embeds, embeds))
    token.copy_(torch.where(active, next_token, token))
    confidence.copy_(torch.where(active & editable, c, confidence))
    masked.copy_(torch.where(active, next_masked, masked))
    step.add_((~converged).to(step.dtype))
    converged.logical_or_(now_converged)
