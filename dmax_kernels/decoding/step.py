"""The seam between the batch loop and what decides tokens, and the step that most rules share.

Shapes: B rows, K positions of a block, V vocabulary, D hidden size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import ModuleType
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dmax_kernels import reference
from dmax_kernels._checks import require
from dmax_kernels.decoding.config import DecodeConfig, RunConfig
from dmax_kernels.decoding.state import LiveBlocks


class Rule(ABC):
    """What happens between two forward passes. Pass an instance as `spd_generate(rule=...)`.

    The loop runs the model over the live blocks, calls `update_` once, and looks at
    `state.converged`: a row that is True there has finished its block, whose tokens are then
    `state.token` at its editable positions. The loop does the rest (cache, batches, end of
    sequence, step cap, trace, streaming), which leaves a rule a function of one block's state.

    A rule gets B live rows, each in a block of its own sequence. Rows may be in different blocks,
    and row i of one step may be a different request at the next. A rule therefore keeps nothing per
    row itself: what is fixed for a row is in the state (`state.row`, `state.start`,
    `state.thresholds`), `state.step` counts the block's steps, and what a rule wants to remember of
    them it keeps in `state.memory`, whose buffers it declares. It runs the same operations
    whatever the values are, and never reads one on the host (no `.item()`, no `if tensor`, no
    boolean index): on a GPU the step is captured once as a CUDA graph and replayed.
    """

    # Whether a token may still change once it is decoded. Where it may not, penalties count it
    revise: bool = True

    def begin_(  # noqa: B027 - most rules begin with a block that is fully masked
        self, state: LiveBlocks, rows: Tensor, embedding: Tensor, config: RunConfig
    ) -> None:
        """Change the start of a block where rows, bool [B], is True: it is all masks until now.

        Called outside of any graph. By default this does nothing.
        """

    def memory(self, rows: int, config: RunConfig, device: torch.device) -> dict[str, Tensor]:
        """Buffers [rows, ...] for `state.memory`; by default none.

        The loop moves them with their rows, and fills them with 0 where a block begins.
        """
        return {}

    def max_steps(self, block_length: int) -> int:
        """The steps after which a block is cut off, unless the caller says how many."""
        return block_length

    @abstractmethod
    def update_(
        self, logits: Tensor, embedding: Tensor, state: LiveBlocks, config: RunConfig
    ) -> None:
        """One step, in place: logits [B, K, V] of the live blocks, embedding [V, D].

        Reads all of `state` and `config` (`mask_token_id`, `functions`: the fused or the reference
        functions, ...); `state.visible(config)` says which tokens count. Writes `masked`, `token`,
        `confidence`, `converged`, `inputs_embeds` (what the next pass reads: e(mask), a token's or
        a hybrid embedding) and the rule's `memory`, and adds 1 to `step`, for the rows that are not
        converged. A row that is converged on entry stays as it is, to the last bit. `editable`,
        `row`, `start` and `thresholds` are read only. Each step should decide at least one masked
        position, or the step cap ends the block.
        """


UNREAD = torch.empty(0)  # a statistic that the rule does not read


class Seen(NamedTuple):
    """What a forward pass said about a block, and the block's state: what a formula may read."""

    masked: Tensor  # bool [..., K]
    token: Tensor = UNREAD  # int64 [..., K]: the top-1, or the sample
    confidence: Tensor = UNREAD  # float32 [..., K]: its probability at temperature 1, unfiltered
    runner_up: Tensor = UNREAD  # float32 [..., K]: the second largest probability
    entropy: Tensor = UNREAD  # float32 [..., K], in nats
    tau_dec: float | Tensor = 0.5  # one number, or each row's [..., 1]
    step: Tensor = UNREAD  # int32 [...]: steps that the block has taken
    editable: Tensor = UNREAD  # bool [..., K]: False at the prompt's tail
    functions: ModuleType = reference  # or dmax_kernels
    probability: Tensor = UNREAD  # float32 [..., K]: of the sample, with its filters
    row: Tensor = UNREAD  # int64 [...]: which of the caller's prompts this is


def draw(
    logits: Tensor, top1: Tensor, confidence: Tensor, state: LiveBlocks, config: RunConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """A sample per position [B, K], its confidence, and its probability with the row's options.

    The confidence is the model's own, softmax(logits)[sample] at temperature 1 and before the
    filters, as in LLaDA's and Fast-dLLM's samplers: a sharper temperature or a narrower filter
    makes a choice more certain, but not more right, and a threshold keeps its meaning.

    A sample is keyed by its row's seed and its position in the row's sequence, and by nothing else.
    It therefore depends on no other row. It also keeps its noise from step to step: a sample
    changes only as its logits do. Blocks under `revise` then converge as greedy ones do, and a
    position that has to wait is not drawn again until a likelier token comes up.
    """
    shape = state.token.shape
    rows = {name: value.unsqueeze(-1).expand(shape) for name, value in state.sampling.items()}
    position = state.start.unsqueeze(-1) + torch.arange(shape[-1], device=state.start.device)
    sample = config.functions.sample_tokens(
        logits,
        torch.stack([rows["seed"], position], dim=-1),
        temperature=rows["temperature"],
        top_k=rows["sample_top_k"],
        top_p=rows["top_p"],
        min_p=rows["min_p"],
        **state.visible(config),
    )
    x, largest = logits.gather(-1, torch.stack([sample.token, top1], dim=-1)).float().unbind(-1)
    confidence = confidence * (x - largest).exp()
    greedy = rows["temperature"] == 0
    return sample.token, confidence, torch.where(greedy, confidence, sample.probability)


def check_sampling(rule: Rule, config: DecodeConfig, steps_composed: bool) -> None:
    """Refuse a temperature where it would change nothing: such a rule would stay greedy.

    steps_composed: this rule takes a `ComposedRule`'s step where tokens are sampled.
    """
    if not config.samples:
        return
    require(
        config.semantics != "released",
        "spd_generate: semantics",
        "'settled' or 'paper' where tokens are sampled",
        "'released'",
    )
    composed = isinstance(rule, ComposedRule) and all(
        getattr(type(rule), name) is getattr(ComposedRule, name) for name in ("see_", "update_")
    )
    require(
        steps_composed or composed,
        "spd_generate: temperature",
        "0 with a rule that makes its own predictions",
        f"{config.temperature} with rule '{config.rule}'",
    )


class ComposedRule(Rule):
    """A rule that says which masked positions to promote; the rest of the step is common.

    With a temperature, a position's prediction is a sample (`draw`) in place of the top-1, for the
    formula, the convergence and the soft embedding alike.

    revise: predict token positions anew at each step, until the block converges by
        `config.convergence`; otherwise a token once decoded stays, and the block ends when no mask
        is left.
    soft: token positions enter the next pass as hybrid embeddings (Eqs. 8-10); otherwise as the
        plain embedding of their token.
    reads: the function that makes the statistics: "top1_confidence", or "row_statistics" for a rule
        that reads the runner-up or the entropy too.
    """

    revise: bool = False
    soft: bool = False
    reads: ClassVar[str] = "top1_confidence"

    @abstractmethod
    def promote(self, seen: Seen) -> Tensor:
        """bool [..., K]: the masked positions that become token positions.

        At least one position is promoted in every row that has a masked one.
        """

    def see_(self, logits: Tensor, state: LiveBlocks, config: RunConfig) -> Seen:
        """The statistics that `promote` reads; a rule with a memory brings it up to date here."""
        functions = config.functions
        statistics = getattr(functions, self.reads)(logits, **state.visible(config))
        y, c = statistics[:2]
        probability = UNREAD
        if state.sampling:
            y, c, probability = draw(logits, y, c, state, config)
        others = statistics[2:4] if self.reads == "row_statistics" else (UNREAD, UNREAD)
        return Seen(
            state.masked,
            y,
            c,
            runner_up=others[0],
            entropy=others[1],
            tau_dec=state.tau_dec,
            step=state.step,
            editable=state.editable,
            functions=functions,
            probability=probability,
            row=state.row,
        )

    def update_(
        self, logits: Tensor, embedding: Tensor, state: LiveBlocks, config: RunConfig
    ) -> None:
        """The paper's step with the parts that this rule and the configuration name.

        With nothing taken away and both criteria this is `spd_step_`, which a test checks.
        """
        functions = config.functions
        seen = self.see_(logits, state, config)
        y, c = seen.token, seen.confidence
        promoted = self.promote(seen)
        if not self.revise:
            y = torch.where(state.masked, y, state.token)
            c = torch.where(state.masked, c, state.confidence)

        # Leave the mask, then look for convergence row by row
        masked = state.masked & ~promoted
        if self.revise:
            repeated = y == state.token
            if config.semantics == "settled":  # at a mask, a repeated prediction decides nothing
                repeated &= ~state.masked
            same = (repeated | ~state.editable).all(dim=-1) & (state.step >= 1)
            sure = ((c > state.tau_acc) | ~state.editable).all(dim=-1)
            criteria = {"both": same | sure, "consistency": same, "confidence": sure}
            converged = criteria[config.convergence]
        else:
            converged = ~masked.any(dim=-1)
        masked = masked & ~converged.unsqueeze(-1)  # a commit takes every position

        # Inputs of the next pass
        token = torch.where(state.editable, y, state.token)
        embeds = F.embedding(token.masked_fill(masked, config.mask_token_id), embedding)
        if self.soft:
            top = (y, c)
            if config.top_k > 1:
                top = functions.topk_confidence(logits, config.top_k, **state.visible(config))
            hybrid = functions.hybrid_embedding(embedding, *top, masked, config.mask_token_id)
            embeds = torch.where(state.editable.unsqueeze(-1), hybrid, embeds)

        # Rows that had converged before this step keep all of their state
        active = ~state.converged.unsqueeze(-1)
        if state.sampling and state.record:
            state.record["probability"].copy_(seen.probability)
        state.masked.copy_(torch.where(active, masked, state.masked))
        state.token.copy_(torch.where(active, token, state.token))
        state.confidence.copy_(torch.where(active & state.editable, c, state.confidence))
        state.inputs_embeds.copy_(torch.where(active.unsqueeze(-1), embeds, state.inputs_embeds))
        state.step.add_(~state.converged)
        state.converged.logical_or_(converged)
