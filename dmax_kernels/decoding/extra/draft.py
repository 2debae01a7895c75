"""Draft and verify: the tokens of one decoding in fewer passes (FreeDave, arXiv 2510.00294)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dmax_kernels._checks import read_integer, require
from dmax_kernels.decoding.config import PENALTIES, RunConfig
from dmax_kernels.decoding.output import GenerationOutput
from dmax_kernels.decoding.prompts import Prompts, Rows, read_prompts, unwrap
from dmax_kernels.decoding.rules import RULES
from dmax_kernels.decoding.spd import spd_generate
from dmax_kernels.decoding.state import LiveBlocks
from dmax_kernels.decoding.step import ComposedRule, Rule


@dataclass(frozen=True)
class Drafted(Rule):
    """The step of another rule, over rows that come in groups of `drafts`.

    Row 0 of a group holds the block's state. Row d holds the state that d further steps would lead
    to if the predictions of the last pass did not change. One pass runs over all of them. The
    rule's step on row d then gives the true state after row d, and where this equals row d + 1,
    that row's step counts too. A pass so takes 1 to D steps of a group of D rows, and they are the
    steps that the rule would have taken in as many passes. States are compared by their masks,
    their decided tokens and what the rule remembers.
    """

    rule: ComposedRule
    drafts: int
    revise = False

    def begin_(self, state: LiveBlocks, rows: Tensor, embedding: Tensor, config: RunConfig) -> None:
        self.rule.begin_(state, rows, embedding, config)

    def memory(self, rows: int, config: RunConfig, device: torch.device) -> dict[str, Tensor]:
        steps = torch.zeros(rows, dtype=torch.int32, device=device)
        return {**self.rule.memory(rows, config, device), "rule_step": steps}

    def max_steps(self, block_length: int) -> int:
        return self.rule.max_steps(block_length)

    def update_(
        self, logits: Tensor, embedding: Tensor, state: LiveBlocks, config: RunConfig
    ) -> None:
        passes = state.step + (~state.converged).int()  # the loop counts these
        state.step.copy_(state.memory["rule_step"])
        before = {name: buffer.clone() for name, buffer in moved(state).items()}
        self.rule.update_(logits, embedding, state, config)

        # How far the drafts were right: what the rule made of row d is what row d + 1 was
        rows, number = torch.arange(len(passes), device=passes.device), self.drafts
        same = (state.masked | (before["token"].roll(-1, 0) == state.token)).all(dim=-1)
        for name in ("masked", *(name for name in state.memory if name != "rule_step")):
            agrees = before[name].roll(-1, 0) == moved(state)[name]
            same &= agrees.flatten(1).all(dim=-1)
        same &= rows % number < number - 1
        right = same.view(-1, number).int().cumprod(dim=-1).sum(dim=-1)
        first = rows[::number]
        for d in range(1, number):  # a token keeps the confidence of its own step
            earlier, own = state.confidence[first + d - 1], state.confidence[first + d]
            state.confidence[first + d] = torch.where(before["masked"][first + d], own, earlier)

        # All rows of a group go on from there: row d by d more steps with these same predictions
        chosen = (first + right).repeat_interleave(number)
        for buffer in moved(state).values():
            buffer.copy_(buffer[chosen])
        converged, logits = state.converged.clone(), logits[chosen]
        for d in range(1, number):
            ahead = state.map(Tensor.clone)
            self.rule.update_(logits, embedding, ahead, config)
            for name, buffer in moved(state).items():
                drafted = (rows % number >= d).view(-1, *[1] * (buffer.dim() - 1))
                buffer.copy_(torch.where(drafted, moved(ahead)[name], buffer))
        state.converged.copy_(converged)  # a draft decides nothing
        state.memory["rule_step"].copy_(state.step)
        state.step.copy_(passes)


def moved(state: LiveBlocks) -> dict[str, Tensor]:
    """What a step changes; the rest of a row says which one it is."""
    return {**state.spd_buffers(), **state.memory}


def for_drafts(name: str, value: Any, drafts: int) -> Any:
    """An option with one value for each prompt, as it is for the rows of the drafts."""
    if isinstance(value, Tensor) and value.dim() == (2 if name == "logit_bias" else 1):
        return value.repeat_interleave(drafts, 0)
    if isinstance(value, (list, tuple)):
        return [each for each in value for _ in range(drafts)]
    return value


def draft_generate(
    model: Any,
    input_ids: Prompts,
    *,
    drafts: int = 4,
    rule: str | Rule = "top_n",
    attention_mask: Rows | None = None,
    thresholds: Tensor | Sequence[Sequence[float]] | None = None,
    logprobs: bool = False,
    **options: Any,
) -> GenerationOutput:
    """What `spd_generate` decodes with this rule, in at most as many forward passes.

    Every pass runs over `drafts` states of each row: the block as it is, and the blocks that the
    last predictions lead to in 1, 2, ... further steps. Drafts that the pass confirms are kept.
    Given the same logits, the tokens are those of the rule without drafts. A pass has `drafts`
    times the rows, and so do cache and prefill: this saves time where a pass takes as long for
    several rows as for one. The rule's step runs `drafts` times per pass. A rule that remembers
    probabilities (credit) confirms no draft, because they differ from pass to pass.

    Args:
        model, input_ids, attention_mask, thresholds, logprobs: as for `spd_generate`.
        drafts: states of a row that a pass runs over, at least 1.
        rule: its name, or an instance, of a rule that keeps a token once it is decoded.
        options: passed on to `spd_generate`; no temperature, no trace and no `on_block`.

    Returns:
        As `spd_generate`. `num_forwards` counts passes, and `step_map` the pass of its block in
        which a token was confirmed.

    Raises:
        ValueError: a rule that revises tokens, fewer than 1 draft, and whatever `spd_generate`
            rejects.
    """
    drafts = read_integer("draft_generate: drafts", drafts, "a positive integer")
    chosen = RULES.get(rule) if isinstance(rule, str) else rule
    keeps = isinstance(chosen, ComposedRule) and not (chosen.revise or chosen.soft)
    need = "one that keeps a token once it is decoded (threshold, top_n, ...)"
    require(keeps, "draft_generate: rule", need, repr(rule))
    assert isinstance(chosen, ComposedRule)
    for name in ("trace", "on_block"):
        require(not options.get(name), f"draft_generate: {name}", "left out", options.get(name))
    prompts = read_prompts(*unwrap(input_ids, attention_mask))
    if thresholds is not None:
        thresholds = torch.as_tensor(thresholds, device="cpu").repeat_interleave(drafts, 0)
    for name in (*PENALTIES, "logit_bias"):
        if name in options:
            options[name] = for_drafts(name, options[name], drafts)
    output = spd_generate(
        model,
        [prompt for prompt in prompts for _ in range(drafts)],
        rule=Drafted(chosen, drafts),
        thresholds=thresholds,
        logprobs=logprobs,
        **options,
    )
    names = ("sequences", "num_tokens", "block_forwards", "num_refreshes", "step_map", "logprobs")
    rows = {name: getattr(output, name) for name in names if getattr(output, name) is not None}
    statistics = replace(
        output.statistics,
        tokens=output.statistics.tokens // drafts,
        row_forwards=output.statistics.row_forwards // drafts,
    )
    return replace(
        output,
        **{name: value[::drafts] for name, value in rows.items()},
        promotions=output.promotions[::drafts],
        statistics=statistics,
    )
