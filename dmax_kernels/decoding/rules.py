"""What happens after a forward pass: the fused SPD step, and the paper's ablations of it.

The ablations (Tables 3 and 4) are put together from the same small ops, so each is SPD with one
idea taken away. All of them work on a `LiveBlocks` in place and leave converged rows alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from dmax_kernels.decoding.rule import Rule
from dmax_kernels.decoding.state import LiveBlocks

if TYPE_CHECKING:
    from dmax_kernels.decoding.settings import Settings


class SoftParallel(Rule):
    """The paper's rule: one fused step, `spd_step_`."""

    def update_(
        self, logits: Tensor, embedding: Tensor, state: LiveBlocks, settings: Settings
    ) -> None:
        if settings.convergence != "both":
            composed_step_(logits, embedding, state, settings, ABLATIONS["spd"])
            return
        settings.ops.spd_step_(
            logits,
            embedding,
            **state.spd_buffers(),
            mask_token_id=settings.mask_token_id,
            tau_dec=settings.tau_dec,
            tau_acc=settings.tau_acc,
            semantics=settings.semantics,
            top_k=settings.top_k,
            suppress_token=settings.suppress_token,
            thresholds=state.thresholds,
        )


@dataclass(frozen=True)
class Ablation(Rule):
    """Three switches span the paper's Table 3.

    prefix: promote only the leftmost run of confident masked positions; otherwise every confident
        one. Where none is confident: the leftmost, or the most confident, so that a step always
        makes progress.
    revise: predict token positions anew at each step; otherwise a token once decoded stays, and
        the block ends when no mask is left.
    soft: token positions enter the next pass as hybrid embeddings (Eqs. 8-10); otherwise as the
        plain embedding of their token.
    """

    prefix: bool
    revise: bool
    soft: bool

    def update_(
        self, logits: Tensor, embedding: Tensor, state: LiveBlocks, settings: Settings
    ) -> None:
        composed_step_(logits, embedding, state, settings, self)


ABLATIONS = {
    "spd": Ablation(prefix=True, revise=True, soft=True),
    "hybrid": Ablation(prefix=False, revise=True, soft=True),
    "hard_prefix": Ablation(prefix=True, revise=True, soft=False),
    "hard": Ablation(prefix=False, revise=True, soft=False),
    "threshold": Ablation(prefix=False, revise=False, soft=False),
}
# What `spd_generate(rule=name)` knows by name; any other `Rule` is passed as an instance
RULES: dict[str, Rule] = {**ABLATIONS, "spd": SoftParallel()}


def composed_step_(
    logits: Tensor, embedding: Tensor, state: LiveBlocks, s: Settings, rule: Ablation
) -> None:
    """The paper's step with the parts that `rule` and `s.convergence` name.

    With nothing taken away and both criteria this is `spd_step_`, which a test holds it to.
    """
    ops = s.ops
    y, c = ops.top1_confidence(logits, suppress_token=s.suppress_token)
    if not rule.revise:
        y = torch.where(state.masked, y, state.token)
        c = torch.where(state.masked, c, state.confidence)

    # Promote masked positions, then look for convergence row by row
    if rule.prefix:
        # The op's threshold is one number; each row has its own
        promoted = ops.prefix_promote((c > state.tau_dec).float(), state.masked, 0.5)
    else:
        promoted = promote_all(c, state.masked, state.tau_dec)
    masked = state.masked & ~promoted
    if rule.revise:
        # A prediction at a mask position is no decision yet, repeated or not
        decided = (y == state.token) & ~state.masked
        same = (decided | ~state.editable).all(dim=-1) & (state.step >= 1)
        sure = ((c > state.tau_acc) | ~state.editable).all(dim=-1)
        converged = {"both": same | sure, "consistency": same, "confidence": sure}[s.convergence]
    else:
        converged = ~masked.any(dim=-1)
    masked = masked & ~converged.unsqueeze(-1)  # a commit takes every position: no mask is left

    # Inputs of the next pass
    token = torch.where(state.editable, y, state.token)
    embeds = F.embedding(token.masked_fill(masked, s.mask_token_id), embedding)
    if rule.soft:
        top = (y, c)
        if s.top_k > 1:
            top = ops.topk_confidence(logits, s.top_k, suppress_token=s.suppress_token)
        hybrid = ops.hybrid_embedding(embedding, *top, masked, s.mask_token_id)
        embeds = torch.where(state.editable.unsqueeze(-1), hybrid, embeds)

    # Rows that had converged before this step keep all of their state
    active = ~state.converged.unsqueeze(-1)
    state.masked.copy_(torch.where(active, masked, state.masked))
    state.token.copy_(torch.where(active, token, state.token))
    state.confidence.copy_(torch.where(active & state.editable, c, state.confidence))
    state.inputs_embeds.copy_(torch.where(active.unsqueeze(-1), embeds, state.inputs_embeds))
    state.step.add_(~state.converged)
    state.converged.logical_or_(converged)


def promote_all(confidence: Tensor, masked: Tensor, threshold: Tensor | float) -> Tensor:
    """Masked positions above the threshold, wherever they are; else the most confident one."""
    above = masked & (confidence > threshold)
    rank = confidence.nan_to_num(nan=-1.0).masked_fill(~masked, -2.0)
    best = F.one_hot(rank.argmax(dim=-1), rank.shape[-1]).bool() & masked
    return torch.where(above.any(dim=-1, keepdim=True), above, best)
