"""Rules that keep something of each row from step to step, in `state.memory`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dmax_kernels.decoding.config import RunConfig, read_ids
from dmax_kernels.decoding.rule_parts import (
    above_threshold,
    keep_integer,
    keep_number,
    rank_within,
)
from dmax_kernels.decoding.state import LiveBlocks
from dmax_kernels.decoding.step import ComposedRule, Rule, Seen


@dataclass(frozen=True)
class Credit(ComposedRule):
    """`threshold` on predictions that earlier steps have a say in.

    Each step, the top-1 of a masked position earns p^gamma of credit C, with p its probability, and
    what was earned before is multiplied by beta. Token and confidence are then those of
    softmax(logits + alpha log(1 + C)): a token that keeps coming up passes sooner. This is
    CreditDecoding (arXiv 2510.06133) with the formulas and defaults of dInfer's decoder.

    A position has credit at as many tokens as it has taken steps at most, so that the memory holds
    their ids instead of a matrix over the vocabulary: the logits are read once, and gathered at
    these ids.
    """

    alpha: float = 0.7
    beta: float = 0.8
    gamma: float = 0.2
    reads = "row_statistics"

    def __post_init__(self) -> None:
        keep_number(self, "alpha", "at least 0", lambda value: value >= 0)
        keep_number(self, "beta", "in [0, 1]", lambda value: 0 <= value <= 1)
        keep_number(self, "gamma", "at least 0", lambda value: value >= 0)

    def memory(self, rows: int, config: RunConfig, device: torch.device) -> dict[str, Tensor]:
        shape = (rows, config.block_length, config.max_steps_per_block)
        return {
            "credit_token": torch.zeros(shape, dtype=torch.int64, device=device),
            "credit": torch.zeros(shape, dtype=torch.float32, device=device),
        }

    def see_(self, logits: Tensor, state: LiveBlocks, config: RunConfig) -> Seen:
        y, p, *_, logsumexp = config.functions.row_statistics(logits, **state.visible(config))
        ids, credit = state.memory["credit_token"], state.memory["credit"]
        active = ~state.converged.unsqueeze(-1)
        earns = state.masked & active & ~p.isnan()

        # The slot of y: where it has credit, or else the one that this step alone can fill
        known = (ids == y.unsqueeze(-1)) & (credit > 0)
        fresh = state.step.long().clamp(max=ids.shape[-1] - 1).unsqueeze(-1)
        slot = torch.where(known.any(dim=-1), known.int().argmax(dim=-1), fresh).unsqueeze(-1)
        credit.copy_(torch.where(active.unsqueeze(-1), self.beta * credit, credit))
        earned = credit.gather(-1, slot) + torch.where(earns, p**self.gamma, 0.0).unsqueeze(-1)
        credit.scatter_(-1, slot, earned)
        spent = ids.gather(-1, slot)
        ids.scatter_(-1, slot, torch.where(earns.unsqueeze(-1), y.unsqueeze(-1), spent))

        # y itself has credit now, hence no token without any can be the best
        x, boost = logits.gather(-1, ids).float(), self.alpha * torch.log1p(credit)
        score = torch.where(credit > 0, x + boost, -torch.inf)
        best = score.amax(dim=-1, keepdim=True)
        token = torch.where(score == best, ids, torch.iinfo(torch.int64).max).amin(dim=-1)
        more = torch.where(credit > 0, (x - logsumexp.unsqueeze(-1)).exp() * boost.expm1(), 0.0)
        confidence = (best.squeeze(-1) - logsumexp).exp() / (1 + more.sum(dim=-1))
        return Seen(
            state.masked,
            torch.where(earns, token, y),
            torch.where(earns, confidence, p),
            tau_dec=state.tau_dec,
        )

    def promote(self, seen: Seen) -> Tensor:
        return above_threshold(seen)


@dataclass(frozen=True)
class AdaBlock(ComposedRule):
    """`threshold` inside a part of the block that ends after a delimiter, one part after another.

    A part begins at the leftmost mask. Where it ends is read from the pass that begins it: of the
    next `window` positions, the one that predicts a delimiter with the highest confidence is the
    last, if that confidence is at least `delimiter_threshold`; otherwise the part has
    `default_length` positions. The next part begins when no mask is left in this one. This is
    AdaBlock-dLLM (arXiv 2509.26432), which divides a whole answer: for a fully bidirectional model
    take a `block_length` that holds prompt and answer, and for its `window` a quarter of the
    answer. A block-diffusion model's own blocks stay where they are, and the parts lie in them.

    delimiters: token ids, such as that of the newline.
    """

    delimiters: tuple[int, ...]
    delimiter_threshold: float = 0.3
    default_length: int = 16
    window: int = 64

    def __post_init__(self) -> None:
        object.__setattr__(self, "delimiters", read_ids("delimiters of AdaBlock", self.delimiters))
        keep_number(self, "delimiter_threshold", "in [0, 1]", lambda value: 0 <= value <= 1)
        keep_integer(self, "default_length", "a positive integer")
        keep_integer(self, "window", "a positive integer")

    def memory(self, rows: int, config: RunConfig, device: torch.device) -> dict[str, Tensor]:
        return {"part_end": torch.zeros(rows, 1, dtype=torch.int64, device=device)}

    def see_(self, logits: Tensor, state: LiveBlocks, config: RunConfig) -> Seen:
        seen, end = super().see_(logits, state, config), state.memory["part_end"]
        position = torch.arange(seen.masked.shape[-1], device=end.device)
        inside = (seen.masked & (position < end)).any(dim=-1, keepdim=True)
        start = (seen.masked.cumsum(dim=-1) == 0).sum(dim=-1, keepdim=True)
        delimits = torch.zeros_like(seen.masked)
        for token in self.delimiters:  # a tensor of them could not be made inside a CUDA graph
            delimits |= seen.token == token
        delimits &= seen.masked & (position < start + self.window)
        surest = delimits & (rank_within(seen.confidence, delimits) == 0)
        surest &= seen.confidence >= self.delimiter_threshold
        last = torch.where(surest, position + 1, 0).amax(dim=-1, keepdim=True)
        fresh = torch.where(last > 0, last, start + self.default_length)
        keeps = inside | state.converged.unsqueeze(-1)
        end.copy_(torch.where(keeps, end, fresh))
        return seen._replace(masked=seen.masked & (position < end))

    def promote(self, seen: Seen) -> Tensor:
        return above_threshold(seen)


@dataclass(frozen=True)
class Edit(Rule):
    """Fill masks with c > tau_dec, and edit tokens: LLaDA2.1's decoding, SGLang's JointThreshold.

    At least the `tokens_per_step` most confident masks are filled. A token is replaced wherever
    another one is the top-1 with c > edit_threshold, while masks are left and for at most
    `max_post_edit_steps` steps after that. A block ends when a step without a mask edits nothing,
    or when those steps are used up (arXiv 2602.08676; `edit_step_` with "joint_threshold"). For a
    model that was trained to correct its tokens. Its quality mode is tau_dec 0.7 with the defaults
    here, its speed mode tau_dec 0.5 and edit_threshold 0.
    """

    edit_threshold: float = 0.5
    tokens_per_step: int = 1
    max_post_edit_steps: int = 16

    def __post_init__(self) -> None:
        keep_number(self, "edit_threshold", "in [0, 1]", lambda value: 0 <= value <= 1)
        keep_integer(self, "tokens_per_step", "a positive integer")
        keep_integer(self, "max_post_edit_steps", "an integer, at least 0", least=0)

    def memory(self, rows: int, config: RunConfig, device: torch.device) -> dict[str, Tensor]:
        return {"post_edit_steps": torch.zeros(rows, dtype=torch.int32, device=device)}

    def max_steps(self, block_length: int) -> int:
        return block_length + self.max_post_edit_steps

    def update_(
        self, logits: Tensor, embedding: Tensor, state: LiveBlocks, config: RunConfig
    ) -> None:
        # The op knows masks by their id; the state has the last top-1 there
        token = state.token.masked_fill(state.masked, config.mask_token_id)
        before = token.clone()
        prediction, confidence = state.token.clone(), state.confidence.clone()
        done, steps = state.converged.clone(), state.memory["post_edit_steps"]
        config.functions.edit_step_(
            logits,
            editable=state.editable,
            token=token,
            prediction=prediction,
            confidence=confidence,
            post_edit_steps=steps,
            done=done,
            mask_token_id=config.mask_token_id,
            threshold=config.tau_dec,
            rule="joint_threshold",
            tokens_per_step=self.tokens_per_step,
            max_post_edit_steps=self.max_post_edit_steps,
            **state.visible(config),
            thresholds=F.pad(state.tau_dec, (0, 1), value=self.edit_threshold),
        )
        active = ~state.converged.unsqueeze(-1)
        masked = torch.where(active, state.editable & (token == config.mask_token_id), state.masked)
        # A step that could edit nothing any more need not be taken
        spent = ~masked.any(dim=-1) & (steps >= self.max_post_edit_steps)
        embeds = F.embedding(token, embedding)
        state.inputs_embeds.copy_(torch.where(active.unsqueeze(-1), embeds, state.inputs_embeds))
        took = masked | (token != before)
        state.confidence.copy_(torch.where(active & took, confidence, state.confidence))
        state.token.copy_(torch.where(masked, prediction, token))
        state.masked.copy_(masked)
        state.step.add_(~state.converged)
        state.converged.logical_or_(done | spent)
