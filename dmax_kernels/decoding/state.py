"""What one denoising step reads and writes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from dmax_kernels.decoding.config import RunConfig

State = TypeVar("State", bound="BlockState")


@dataclass
class BlockState:
    """The buffers of one block of K positions in B rows; a step changes them in place.

    A position is *editable* when this block decodes it (a prompt's tail inside the block is not),
    and *masked* until it is promoted to a token position. A row is *converged* once its block is
    committed; from then on a step leaves all of the row's state alone.
    """

    editable: Tensor  # bool [B, K]
    masked: Tensor  # bool [B, K]
    token: Tensor  # int64 [B, K]: last top-1, or the prompt's token where not editable
    confidence: Tensor  # float32 [B, K]: probability of the last top-1
    converged: Tensor  # bool [B]
    step: Tensor  # int32 [B]: steps this row took part in
    inputs_embeds: Tensor  # [B, K, D]: what the next forward pass reads

    @classmethod
    def fully_masked(
        cls: type[State],
        token: Tensor,
        prompt_tail: int | Tensor,
        embedding: Tensor,
        mask_token_id: int,
        **further: Any,
    ) -> State:
        """The state before the first step: all masks, except a prompt's tail.

        token: [B, K], of which only the tail is read; prompt_tail: its length, or one per row [B];
        further: the fields that a subclass adds to these buffers.
        """
        rows, length = token.shape
        position = torch.arange(length, device=token.device)
        tail = torch.as_tensor(prompt_tail, device=token.device).view(-1, 1)
        editable = (position >= tail).expand(rows, -1).contiguous()
        token = token.masked_fill(editable, mask_token_id)
        return cls(
            editable=editable,
            masked=editable.clone(),
            token=token,
            confidence=(~editable).float(),
            converged=torch.zeros(rows, dtype=torch.bool, device=token.device),
            step=torch.zeros(rows, dtype=torch.int32, device=token.device),
            inputs_embeds=F.embedding(token, embedding),
            **further,
        )

    def spd_buffers(self) -> dict[str, Tensor]:
        """The buffers of `spd_step_`, by its argument names."""
        return {each.name: getattr(self, each.name) for each in fields(BlockState)}


@dataclass
class LiveBlocks(BlockState):
    """The blocks that a batch of independent rows is at, each in its own sequence."""

    row: Tensor  # int64 [B]: which of the caller's prompts this is
    start: Tensor  # int64 [B]: position of the block's first token in the row's sequence
    thresholds: Tensor  # float32 [B, 2]: (tau_dec, tau_acc) of the row
    # [B, ...] each: what the rule keeps of the block's earlier steps (`Rule.memory`)
    memory: dict[str, Tensor] = field(default_factory=dict)
    # [B] each: the options of the row's samples (`config.SAMPLING`); none where all are greedy
    sampling: dict[str, Tensor] = field(default_factory=dict)
    # [B, K] each: step_map int32, probability and logprob float32; none unless asked for
    record: dict[str, Tensor] = field(default_factory=dict)
    # allowed int32 [B, K, words]: the tokens that count at each position; none unless asked for
    masks: dict[str, Tensor] = field(default_factory=dict)
    # [B, ...] each: what changes the row's logits (`penalties.Penalties`); none unless asked for
    penalties: dict[str, Tensor] = field(default_factory=dict)

    def visible(self, config: RunConfig) -> dict[str, Any]:
        """Which tokens count, as the keyword arguments of the ops that read logits."""
        return {"suppress_token": config.suppress_token, "allowed": self.masks.get("allowed")}

    @property
    def tau_dec(self) -> Tensor:
        """[B, 1]"""
        return self.thresholds[:, 0:1]

    @property
    def tau_acc(self) -> Tensor:
        """[B, 1]"""
        return self.thresholds[:, 1:2]

    def begin_(self, rows: Tensor, start: Tensor, mask_token_id: int, embedding: Tensor) -> None:
        """Begin a new block, all masks, where rows [B] is True; start [B] is each row's start."""
        positions = rows.unsqueeze(-1)
        self.editable.logical_or_(positions)
        self.masked.logical_or_(positions)
        self.token.masked_fill_(positions, mask_token_id)
        self.confidence.masked_fill_(positions, 0)
        self.converged.logical_and_(~rows)
        self.step.masked_fill_(rows, 0)
        for buffer in (*self.memory.values(), *self.record.values()):
            buffer.masked_fill_(rows.view(-1, *[1] * (buffer.dim() - 1)), 0)
        mask = embedding[mask_token_id]
        self.inputs_embeds.copy_(torch.where(positions.unsqueeze(-1), mask, self.inputs_embeds))
        self.start.copy_(start)

    def cap_(self, max_steps: int, commit: bool) -> None:
        """End the blocks that took `max_steps`; with `commit`, masks become their last top-1."""
        over = self.step >= max_steps
        self.converged.logical_or_(over)
        if commit:
            self.masked.logical_and_(~over.unsqueeze(-1))

    def record_(self, masked: Tensor, token: Tensor) -> None:
        """Note the step, and the log-probability in it, of the positions that took a token.

        masked, token: the state before the step. A position takes a token when it leaves the mask
        and when its token changes; the last time counts.
        """
        took = torch.where(masked, ~self.masked, self.token != token)
        probability = self.record["probability"] if self.sampling else self.confidence
        step = self.step.unsqueeze(-1)
        for name, value in (("step_map", step), ("logprob", probability.log())):
            self.record[name].copy_(torch.where(took, value, self.record[name]))

    def move_rows_(self, sources: Tensor, holes: Tensor) -> None:
        """Row sources[i] takes the place of row holes[i]."""
        for _, buffer in self.buffers():
            buffer[holes] = buffer[sources]

    def first(self, rows: int) -> LiveBlocks:
        """The first rows, in the same memory."""
        return self.map(lambda buffer: buffer[:rows])

    def buffers(self) -> Iterator[tuple[str, Tensor]]:
        """Every buffer by its name, those of the rule included."""
        for name, value in vars(self).items():
            yield from value.items() if isinstance(value, dict) else [(name, value)]

    def map(self, change: Callable[[Tensor], Tensor]) -> LiveBlocks:
        """The state with every buffer changed by a function."""
        changed: dict[str, Any] = {}
        for name, value in vars(self).items():
            several = isinstance(value, dict)
            changed[name] = {n: change(b) for n, b in value.items()} if several else change(value)
        return LiveBlocks(**changed)
