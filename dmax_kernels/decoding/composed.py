"""Rules put together from small ops: what a rule promotes, and the step around it."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dmax_kernels.decoding.rule import Rule
from dmax_kernels.decoding.state import LiveBlocks
from dmax_kernels.reference.statistics import RowStatistics

if TYPE_CHECKING:
    from dmax_kernels.decoding.settings import Settings


class Prediction(NamedTuple):
    """What a composed rule reads from the logits: the top-1, and which masks it fills with it."""

    token: Tensor  # int64 [B, K]
    confidence: Tensor  # float32 [B, K]
    promoted: Tensor  # bool [B, K]


class ComposedRule(Rule):
    """A rule that says which masked positions to promote; the rest of the step is common.

    Subclass `Top1Rule` or `DistributionRule`, by what the rule has to know of the logits.

    revise: predict token positions anew at each step, until the block converges by
        `settings.convergence`; otherwise a token once decoded stays, and the block ends when no
        mask is left.
    soft: token positions enter the next pass as hybrid embeddings (Eqs. 8-10); otherwise as the
        plain embedding of their token.
    """

    revise: bool = False
    soft: bool = False

    @abstractmethod
    def predict(self, logits: Tensor, state: LiveBlocks, settings: Settings) -> Prediction:
        """Top-1 of logits [B, K, V], and the masked positions that become token positions.

        At least one position is promoted in every row that has a masked one.
        """

    def update_(
        self, logits: Tensor, embedding: Tensor, state: LiveBlocks, settings: Settings
    ) -> None:
        composed_step_(logits, embedding, state, settings, self)


class Top1Rule(ComposedRule):
    """A rule that looks at each position's predicted token and its confidence."""

    @abstractmethod
    def promote(
        self, token: Tensor, confidence: Tensor, state: LiveBlocks, settings: Settings
    ) -> Tensor:
        """bool [B, K] from token, int64 [B, K], and confidence, float32 [B, K].

        Usually one function of the module `promote`.
        """

    def predict(self, logits: Tensor, state: LiveBlocks, settings: Settings) -> Prediction:
        token, confidence = settings.ops.top1_confidence(
            logits, suppress_token=settings.suppress_token
        )
        return Prediction(token, confidence, self.promote(token, confidence, state, settings))


class DistributionRule(ComposedRule):
    """A rule that looks at more of each position's distribution than the top-1."""

    @abstractmethod
    def promote(self, statistics: RowStatistics, state: LiveBlocks, settings: Settings) -> Tensor:
        """bool [B, K] from `row_statistics` of the logits, all [B, K]."""

    def predict(self, logits: Tensor, state: LiveBlocks, settings: Settings) -> Prediction:
        statistics = settings.ops.row_statistics(logits, suppress_token=settings.suppress_token)
        promoted = self.promote(statistics, state, settings)
        return Prediction(statistics.token, statistics.confidence, promoted)


def composed_step_(
    logits: Tensor, embedding: Tensor, state: LiveBlocks, s: Settings, rule: ComposedRule
) -> None:
    """The paper's step with the parts that `rule`, `s.convergence` and `s.semantics` name.

    With nothing taken away and both criteria this is `spd_step_`, which a test holds it to.
    """
    y, c, promoted = rule.predict(logits, state, s)
    if not rule.revise:
        y = torch.where(state.masked, y, state.token)
        c = torch.where(state.masked, c, state.confidence)

    # Leave the mask, then look for convergence row by row
    masked = state.masked & ~promoted
    if rule.revise:
        repeated = y == state.token
        if s.semantics == "settled":  # a prediction at a mask is no decision yet, repeated or not
            repeated &= ~state.masked
        same = (repeated | ~state.editable).all(dim=-1) & (state.step >= 1)
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
            top = s.ops.topk_confidence(logits, s.top_k, suppress_token=s.suppress_token)
        hybrid = s.ops.hybrid_embedding(embedding, *top, masked, s.mask_token_id)
        embeds = torch.where(state.editable.unsqueeze(-1), hybrid, embeds)

    # Rows that had converged before this step keep all of their state
    active = ~state.converged.unsqueeze(-1)
    state.masked.copy_(torch.where(active, masked, state.masked))
    state.token.copy_(torch.where(active, token, state.token))
    state.confidence.copy_(torch.where(active & state.editable, c, state.confidence))
    state.inputs_embeds.copy_(torch.where(active.unsqueeze(-1), embeds, state.inputs_embeds))
    state.step.add_(~state.converged)
    state.converged.logical_or_(converged)
