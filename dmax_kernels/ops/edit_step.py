"""One step of threshold decoding with token editing, after the forward pass, in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dmax_kernels.ops._register import register_fake, register_in_place
from dmax_kernels.vocabulary import visible_rows

# The op's schema takes an index into these; csrc/common/semantics.h has the same order
EDIT_RULES = ("threshold", "low_confidence", "joint_threshold", "dinfer_threshold")


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
    suppress_tokens: Sequence[int] = (),
    allowed: Tensor | None = None,
    vocab_limit: int | None = None,
) -> None:
    """One step of an engine's block-diffusion decoding: fill masks, edit tokens, report the end.

    A position is *masked* where it is editable and ``token`` holds ``mask_token_id``. With y, c =
    top1_confidence(logits), a step sets ``token`` to y at some of the masked positions:

    - "threshold": wherever c > threshold, and at the ``tokens_per_step`` most confident ones in any
      case. This is SGLang's ``LowConfidence`` and, with ``tokens_per_step`` as its
      ``num_to_transfer``, the rule of LLaDA2.0 and 2.1 with its floor of tokens per step.
    - "low_confidence": at the ``tokens_per_step`` most confident ones (LLaDA's low-confidence
      remasking, arXiv 2502.09992).
    - "joint_threshold": as "threshold". It also edits: a position that holds a token takes y where
      y is another token and c > edit_threshold. This is SGLang's ``JointThreshold``, the decoding
      of LLaDA2.1 (arXiv 2602.08676).
    - "dinfer_threshold": wherever c >= min(threshold, b - 1e-5), b the largest c, and at the
      ``tokens_per_step`` most confident ones; a position whose y is ``mask_token_id`` does not
      count. This is dInfer's threshold decoder, and ``batched_remask`` of the vLLM plug-in.

    A row is ``done`` in the step that changes nothing, when its tokens have been through the model:
    when it had no mask before the step, and no token is edited or the step is the row's
    (``max_post_edit_steps`` + 1)-th without a mask, which edits nothing any more.
    ``post_edit_steps`` counts those steps.

    The leftmost wins among equal confidences. A NaN passes no threshold, and its position is filled
    only if every other masked one is NaN too: the leftmost of them. Without ``suppress_token`` the
    mask token may be predicted; filling a mask with it leaves a mask, and editing a token into it
    makes one, as in SGLang.

    The state is written in place and nothing syncs with the host. A row that was done before is
    left alone: its logits are not read. Neither are those of tokens that the rule does not edit.

    Args:
        logits: [B, K, V] with K >= 1, float32, bfloat16 or float16: the forward pass over the
            blocks.
        editable: bool [B, K]; False at the prompt's positions, which never change, whatever they
            hold.
        token: int64 [B, K], the ids that the forward pass read, for instance a view of an engine's
            input ids; written.
        prediction, confidence: int64 and float32 [B, K]: y and c, written where the rule reads
            logits: at masked positions, and with "joint_threshold" at all editable ones unless the
            step edits nothing any more.
        post_edit_steps: int32 [B], 0 before a block; written.
        done: bool [B], False before a block; written.
        mask_token_id, threshold, edit_threshold: run-time values; a new one recompiles nothing.
        rule: one of the four above.
        tokens_per_step: at least 1: the fewest masks that a step fills where there are so many.
        max_post_edit_steps: at least 0: steps without a mask that may edit.
        temperature, suppress_token, suppress_tokens, allowed, vocab_limit: as in
            :func:`dmax_kernels.top1_confidence`; a mask of rows is [B, K, ceil(V / 32)].
        thresholds: float32 [B, 2], (threshold, edit_threshold) of each row in place of the two
            numbers.

    Raises:
        ValueError: unknown rule, suppress_tokens or a vocab_limit out of range.
        RuntimeError: wrong dtypes, shapes, devices or ids; a state tensor that is not contiguous; a
            written tensor that shares memory with another argument. Nothing is written then.
    """
    if rule not in EDIT_RULES:
        raise ValueError(f"edit_step_: rule must be one of {EDIT_RULES}, got {rule!r}")
    logits, suppress_token, allowed = visible_rows(
        "edit_step_", logits, suppress_token, suppress_tokens, allowed, vocab_limit
    )
    torch.ops.dmax.edit_step_(
        logits,
        editable,
        token,
        prediction,
        confidence,
        post_edit_steps,
        done,
        mask_token_id,
        threshold,
        edit_threshold,
        rule=EDIT_RULES.index(rule),
        tokens_per_step=tokens_per_step,
        max_post_edit_steps=max_post_edit_steps,
        temperature=temperature,
        suppress_token=suppress_token,
        thresholds=thresholds,
        allowed=allowed,
    )


@register_fake("edit_step_")
def _(*args, **kwargs):
    return None


register_in_place("edit_step_")
