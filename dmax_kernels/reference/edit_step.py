"""One step of threshold decoding with token editing, on static buffers."""

from typing import Any

import torch
from torch import Tensor

from dmax_kernels.ops.edit_step import EDIT_RULES
from dmax_kernels.reference.top1 import top1_confidence


def edit_step_(
    logits: Tensor,
    *,
    editable: Tensor,
    token: Tensor,
    prediction: Tensor,
    confidence: Tensor,
    post_edit_steps: Tensor,
    done: Tensor,
    mask_token_id: int,
    threshold: float,
    edit_threshold: float = 0.0,
    rule: str = "threshold",
    tokens_per_step: int = 1,
    max_post_edit_steps: int = 16,
    temperature: float = 1.0,
    suppress_token: int = -1,
    thresholds: Tensor | None = None,
    **visibility: Any,
) -> None:
    if logits.dim() != 3 or logits.shape[1] < 1:
        raise RuntimeError(
            f"edit_step_: logits must be [B, K, V] with K >= 1, got {list(logits.shape)}"
        )
    if rule not in EDIT_RULES:
        raise ValueError(f"edit_step_: rule must be one of {EDIT_RULES}, got {rule!r}")
    fill: Tensor | float = threshold
    edit: Tensor | float = edit_threshold
    if thresholds is not None:
        fill, edit = thresholds[:, 0:1], thresholds[:, 1:2]

    active = ~done.unsqueeze(-1)  # [B, 1]
    masked = editable & (token == mask_token_id)
    filling = masked.any(dim=-1)
    steps = post_edit_steps + ~filling
    may_edit = (filling | (steps <= max_post_edit_steps)).unsqueeze(-1)
    read = masked
    if rule == "joint_threshold":
        read = editable & may_edit
    y, c = top1_confidence(
        logits, temperature=temperature, suppress_token=suppress_token, **visibility
    )

    # Mask to token
    candidate = masked
    if rule == "dinfer_threshold":
        candidate = masked & (y != mask_token_id)
    key = c.nan_to_num(nan=-1.0).masked_fill(~candidate, -2.0)  # probabilities are at least 0
    order = key.argsort(dim=-1, descending=True, stable=True)
    place = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(-1, order, place)
    filled = ((rank < tokens_per_step) & ~c.isnan()) | (rank == 0)
    if rule == "dinfer_threshold":
        near_best = key.amax(dim=-1, keepdim=True) - 1e-5
        filled |= c >= torch.as_tensor(fill, dtype=c.dtype, device=c.device).minimum(near_best)
    elif rule != "low_confidence":
        filled |= c > fill
    filled &= candidate

    # Token to token
    edited = torch.zeros_like(masked)
    if rule == "joint_threshold":
        edited = editable & ~masked & may_edit & (c > edit) & (y != token)

    # A row that was done before this step keeps all of its state
    token.copy_(torch.where(active & (filled | edited), y, token))
    prediction.copy_(torch.where(active & read, y, prediction))
    confidence.copy_(torch.where(active & read, c, confidence))
    post_edit_steps.copy_(torch.where(done, post_edit_steps, steps))
    done.logical_or_(~filling & ~edited.any(dim=-1))
