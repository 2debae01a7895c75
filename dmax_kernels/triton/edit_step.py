"""One step of threshold decoding with token editing, in place: top-1, then the row's decisions.

Every launch is on the device's stream, and none depends on a value read by the host.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dmax_kernels.ops.edit_step import EDIT_RULES
from dmax_kernels.triton.launch import device_of, mask_of, next_power_of_2, row_view
from dmax_kernels.triton.promote import passes_threshold
from dmax_kernels.triton.top1 import top1_of_rows

LOW_CONFIDENCE = tl.constexpr(EDIT_RULES.index("low_confidence"))
JOINT = tl.constexpr(EDIT_RULES.index("joint_threshold"))
DINFER = tl.constexpr(EDIT_RULES.index("dinfer_threshold"))

NOT_NUMBER = tl.constexpr(-1.0)  # below every probability
NO_CANDIDATE = tl.constexpr(-2.0)


@triton.jit
def load_row(
    editable, token, post_edit_steps, row, mask_token_id, max_post_edit_steps, block,
    RULE: tl.constexpr, BLOCK: tl.constexpr,
):
    """A row's state before the step, and whether its tokens may change."""
    position = tl.arange(0, BLOCK)
    inside = position < block
    at = row * block + position
    is_editable = tl.load(editable + at, mask=inside, other=0) != 0
    old_token = tl.load(token + at, mask=inside, other=0)
    is_masked = is_editable & (old_token == mask_token_id)
    filling = tl.max(is_masked.to(tl.int32), axis=0)
    steps = tl.load(post_edit_steps + row) + 1 - filling
    may_edit = (filling > 0) | (steps <= max_post_edit_steps)
    if RULE != JOINT:
        may_edit = filling < 0  # never
    return is_editable, old_token, is_masked, filling, steps, may_edit


@triton.jit(do_not_specialize=["mask_token_id", "max_post_edit_steps", "block"])
def unread_kernel(
    editable, token, post_edit_steps, done, mask_token_id, max_post_edit_steps, block, unread,
    RULE: tl.constexpr, BLOCK: tl.constexpr,
):
    """unread [B, K]: the positions whose logits the rule does not read."""
    row = tl.program_id(0).to(tl.int64)
    is_editable, _, is_masked, _, _, may_edit = load_row(
        editable, token, post_edit_steps, row, mask_token_id, max_post_edit_steps, block,
        RULE, BLOCK,
    )
    position = tl.arange(0, BLOCK)
    is_done = tl.load(done + row) != 0
    read = (is_masked | (is_editable & may_edit)) & (is_done == 0)
    tl.store(unread + row * block + position, read == 0, mask=position < block)


@triton.jit(
    do_not_specialize=["mask_token_id", "tokens_per_step", "max_post_edit_steps", "block"]
)
def change_kernel(
    top_token, top_confidence, unread, editable, token, prediction, confidence, post_edit_steps,
    done, mask_token_id, threshold, edit_threshold, thresholds, tokens_per_step,
    max_post_edit_steps, block,
    RULE: tl.constexpr, HAS_THRESHOLDS: tl.constexpr, BLOCK: tl.constexpr,
):
    """The changes of one row of the batch."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(done + row):
        return
    if HAS_THRESHOLDS:
        threshold = tl.load(thresholds + row * 2)
        edit_threshold = tl.load(thresholds + row * 2 + 1)
    is_editable, old_token, is_masked, filling, steps, may_edit = load_row(
        editable, token, post_edit_steps, row, mask_token_id, max_post_edit_steps, block,
        RULE, BLOCK,
    )
    position = tl.arange(0, BLOCK)
    inside = position < block
    at = row * block + position
    is_read = tl.load(unread + at, mask=inside, other=1) == 0
    y = tl.load(top_token + at, mask=is_read, other=0)
    c = tl.load(top_confidence + at, mask=is_read, other=0.0)

    # Mask to token
    candidate = is_masked
    if RULE == DINFER:
        candidate = candidate & (y != mask_token_id)
    key = tl.where(candidate, tl.where(c == c, c, NOT_NUMBER), NO_CANDIDATE)
    best = tl.max(key, axis=0)
    filled = candidate & (position < 0)  # none
    if RULE == DINFER:
        filled = candidate & passes_threshold(c, tl.minimum(threshold, best - 1e-5), True)
    elif RULE != LOW_CONFIDENCE:
        filled = candidate & passes_threshold(c, threshold, False)
    # The best one whatever it is, and then numbers only
    left, value, taken = key, best, 0
    while (taken < tokens_per_step) & ((value >= 0) | ((taken == 0) & (value == NOT_NUMBER))):
        chosen = position == tl.min(tl.where(left == value, position, BLOCK), axis=0)
        filled = filled | chosen
        left = tl.where(chosen, NO_CANDIDATE, left)
        value = tl.max(left, axis=0)
        taken += 1

    # Token to token
    edited = is_editable & (is_masked == 0) & may_edit & (y != old_token)
    edited = edited & passes_threshold(c, edit_threshold, False)
    any_edited = tl.max(edited.to(tl.int32), axis=0)

    tl.store(token + at, y, mask=inside & (filled | edited))
    tl.store(prediction + at, y, mask=is_read)
    tl.store(confidence + at, c, mask=is_read)
    tl.store(post_edit_steps + row, steps)
    tl.store(done + row, (filling == 0) & (any_edited == 0))


def edit_step_(
    logits: Tensor,
    editable: Tensor,
    token: Tensor,
    prediction: Tensor,
    confidence: Tensor,
    post_edit_steps: Tensor,
    done: Tensor,
    mask_token_id: int,
    threshold: float,
    edit_threshold: float,
    *,
    rule: int = 0,
    tokens_per_step: int = 1,
    max_post_edit_steps: int = 16,
    temperature: float = 1.0,
    suppress_token: int = -1,
    thresholds: Tensor | None = None,
    allowed: Tensor | None = None,
) -> None:
    batch, block, _ = logits.shape
    if batch == 0:
        return
    unread = torch.empty((batch, block), dtype=torch.bool, device=logits.device)
    shape = {"RULE": rule, "BLOCK": next_power_of_2(block), "num_warps": 1 if block <= 64 else 4}
    with device_of(logits):
        unread_kernel[(batch,)](
            editable, token, post_edit_steps, done, mask_token_id, max_post_edit_steps, block,
            unread, **shape,
        )
        top = top1_of_rows(
            row_view(logits), temperature, suppress_token, unread, mask=mask_of(allowed)
        )
        change_kernel[(batch,)](
            *top, unread, editable, token, prediction, confidence, post_edit_steps, done,
            mask_token_id, float(threshold), float(edit_threshold),
            None if thresholds is None else thresholds.contiguous(),
            min(tokens_per_step, block), max_post_edit_steps, block,
            HAS_THRESHOLDS=thresholds is not None, **shape,
        )
