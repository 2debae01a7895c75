"""Everything of an SPD step that follows the forward pass, in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dmax_kernels.ops._register import register_fake, register_in_place
from dmax_kernels.vocabulary import visible_rows

# The op's schema takes an index into these; csrc/common/semantics.h has the same order
SEMANTICS = ("settled", "paper", "released")


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
    suppress_tokens: Sequence[int] = (),
    allowed: Tensor | None = None,
    vocab_limit: int | None = None,
) -> None:
    """One step of Soft Parallel Decoding after the forward pass (Algorithm 1, lines 4-12).

    1. y, c = top1_confidence(logits).
    2. Promote, in ``masked``, the longest prefix with c > tau_dec, or its first position.
    3. A row converges when y equals ``token`` at every editable position, from its second step on,
       or when c > tau_acc at every editable position. It then commits y at all of them, and later
       calls leave all of its state alone: its logits are not even read. The paper's line 12 counts
       predictions at mask positions too; by default ("settled") they do not count, so predictions
       that repeat end a block only if no mask was left before the step.
    4. token, confidence := y, c where editable; step += 1.
    5. inputs_embeds: e(mask) where masked, the hybrid of Eqs. 8-10 where editable and not masked,
       e(token) elsewhere.

    The state is written in place and nothing syncs with the host. Before the first step of a
    block: ``masked = editable.clone()``, ``token = mask_token_id`` where editable and the prompt's
    token elsewhere, ``converged = False``, ``step = 0``.

    Args:
        logits: [B, K, V] with K >= 1, float32, bfloat16 or float16: the forward pass over the
            blocks.
        embedding: [V, D], the model's input embeddings.
        editable: bool [B, K], the positions this block decodes.
        masked: bool [B, K], a subset of ``editable``; written.
        token: int64 [B, K]; written.
        confidence: float32 [B, K]; written.
        converged: bool [B]; written.
        step: int32 [B]; written.
        inputs_embeds: [B, K, D], embedding's dtype: the next forward pass's input; written.
        mask_token_id, tau_dec, tau_acc: run-time values; a new one recompiles nothing.
        semantics: "settled" as above; "paper" is line 12 as written, which ends a block while
            it has masks if all predictions repeat; "released" gives the ids of the authors'
            released ``decode_uniform``: >= in both tests, convergence when no updated position
            changed, only promoted positions committed, embeddings left alone on the stopping step.
        top_k: tokens in the hybrid embedding, 1..8.
        temperature, suppress_token, suppress_tokens, allowed, vocab_limit: as in
            :func:`dmax_kernels.top1_confidence`; a mask of rows is [B, K, ceil(V / 32)].
        thresholds: float32 [B, 2], (tau_dec, tau_acc) of each row in place of the two numbers.

    Raises:
        ValueError: unknown semantics, suppress_tokens or a vocab_limit out of range.
        RuntimeError: wrong dtypes, shapes, devices, ids or k; a state tensor that is not
            contiguous; a written tensor that shares memory with another argument or requires a
            gradient. Nothing is written then.
    """
    if semantics not in SEMANTICS:
        raise ValueError(f"spd_step_: semantics must be one of {SEMANTICS}, got {semantics!r}")
    logits, suppress_token, allowed = visible_rows(
        "spd_step_", logits, suppress_token, suppress_tokens, allowed, vocab_limit
    )
    if vocab_limit is not None:
        embedding = embedding[:vocab_limit]
    torch.ops.dmax.spd_step_(
        logits,
        embedding,
        editable,
        masked,
        token,
        confidence,
        converged,
        step,
        inputs_embeds,
        mask_token_id,
        tau_dec,
        tau_acc,
        semantics=SEMANTICS.index(semantics),
        top_k=top_k,
        temperature=temperature,
        suppress_token=suppress_token,
        thresholds=thresholds,
        allowed=allowed,
    )


@register_fake("spd_step_")
def _(*args, **kwargs):
    return None


register_in_place("spd_step_")
