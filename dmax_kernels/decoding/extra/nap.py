"""NAP's parallel-forced decoding of a canvas (arXiv 2602.23225, section 5.3, Eq. 5).

A canvas Y = [B_1, R_1, B_2, R_2, ..., B_m, R_m, B_S, S] has m reasoning slots R_j after fixed
headers B_j, and a summary S. All of it lies in one block, where every position sees every other.
The paths are independent because no slot reads the finished tokens of another one first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dmax_kernels._checks import read_integer
from dmax_kernels.decoding.config import RunConfig
from dmax_kernels.decoding.embedding import check_model, embedding_device
from dmax_kernels.decoding.output import GenerationOutput
from dmax_kernels.decoding.prompts import Prompts, Rows, read_prompts, unwrap
from dmax_kernels.decoding.rules import FixedCount, best_of_groups
from dmax_kernels.decoding.spd import spd_generate
from dmax_kernels.decoding.state import LiveBlocks
from dmax_kernels.decoding.step import Seen

HEADER = -1


@dataclass(frozen=True, eq=False)
class Canvas:
    """Fixed headers and slots to decode, laid out in one row of L positions (Eq. 5)."""

    token: Tensor  # int64 [L]: the headers' tokens; not read inside the slots
    slot: Tensor  # int64 [L]: 0 ... m - 1 in the reasoning slots, m in the summary, -1 in headers
    num_slots: int  # m
    offset: int  # length of the first header: where the first slot begins

    @classmethod
    def build(
        cls,
        headers: Sequence[Sequence[int]],
        slot_lengths: Sequence[int],
        summary_header: Sequence[int],
        summary_length: int,
    ) -> Canvas:
        """Lay out one header and one slot per reasoning path, then the summary's.

        Args:
            headers: token ids of each path's header, which may be empty.
            slot_lengths: how many tokens each path has.
            summary_header: token ids of the summary's header.
            summary_length: how many tokens the summary has.

        Raises:
            ValueError: no path, a length below 1, or different numbers of lengths and headers.
        """
        if len(headers) == 0 or len(headers) != len(slot_lengths):
            raise ValueError(
                "Canvas: slot_lengths must be one length for each of at least 1 header, got "
                f"{len(slot_lengths)} for {len(headers)}"
            )
        token: list[int] = []
        slot: list[int] = []
        parts = [*zip(headers, slot_lengths, strict=True), (summary_header, summary_length)]
        for number, (header, slot_length) in enumerate(parts):
            what = "Canvas: the length of a slot"
            length = read_integer(what, slot_length, "a positive integer")
            token += [*header, *[0] * length]
            slot += [HEADER] * len(header) + [number] * length
        return cls(
            torch.tensor(token, dtype=torch.int64),
            torch.tensor(slot, dtype=torch.int64),
            len(headers),
            len(headers[0]),
        )

    @property
    def length(self) -> int:
        return len(self.slot)

    def to(self, device: torch.device) -> Canvas:
        return replace(self, token=self.token.to(device), slot=self.slot.to(device))

    def read(self, sequences: Tensor) -> list[list[list[int]]]:
        """The token ids of each slot, the summary's last, for each row of sequences [B, T + L]."""
        slot = self.slot.to(sequences.device)
        return [
            [row[slot == number].tolist() for number in range(self.num_slots + 1)]
            for row in sequences[:, -self.length :]
        ]


@dataclass(frozen=True, eq=False, kw_only=True)
class CanvasRule(FixedCount):
    """Every reasoning slot advances at every step; the summary follows when they are done.

    tokens_per_step: of each slot.
    """

    canvas: Canvas

    def begin_(self, state: LiveBlocks, rows: Tensor, embedding: Tensor, config: RunConfig) -> None:
        """Write the headers after the prompt's tail, and padding after the canvas."""
        index, inside = self._on_canvas(state.editable, 0)
        slot = torch.where(inside, self.canvas.slot[index], HEADER)
        fixed = torch.where(inside, self.canvas.token[index], config.pad_token_id)
        begins = rows.unsqueeze(-1) & state.editable & (slot == HEADER)
        state.editable.logical_and_(~begins)
        state.masked.logical_and_(~begins)
        state.token.copy_(torch.where(begins, fixed, state.token))
        state.confidence.masked_fill_(begins, 1)
        embeds = F.embedding(state.token, embedding)
        state.inputs_embeds.copy_(torch.where(begins.unsqueeze(-1), embeds, state.inputs_embeds))

    def promote(self, seen: Seen) -> Tensor:
        index, _ = self._on_canvas(seen.editable, self.canvas.offset)
        slot = self.canvas.slot[index]
        candidates = summary_last(seen.masked, slot, self.canvas.num_slots)
        return best_of_groups(seen.confidence, candidates, self.tokens_per_step, slot)

    def _on_canvas(self, editable: Tensor, offset: int) -> tuple[Tensor, Tensor]:
        """Canvas index of each position of a block [B, K], and whether it lies on the canvas.

        The canvas begins `offset` positions before the first editable one; a prompt's tail differs
        in length from row to row, and a rule keeps nothing per row itself.
        """
        begin = (editable.cumsum(dim=-1) == 0).sum(dim=-1, keepdim=True) - offset
        index = torch.arange(editable.shape[-1], device=editable.device) - begin
        inside = (index >= 0) & (index < self.canvas.length)
        return index.clamp(0, self.canvas.length - 1), inside


def summary_last(masked: Tensor, slot: Tensor, summary: int) -> Tensor:
    """masked [..., K], without the positions of the slot `summary` while another slot has one."""
    is_summary = slot == summary
    reasoning = (masked & ~is_summary).any(dim=-1, keepdim=True)
    return masked & ~(is_summary & reasoning)


def nap_generate(
    model: Any,
    input_ids: Prompts,
    canvas: Canvas,
    *,
    tokens_per_step: int = 1,
    block_length: int | None = None,
    attention_mask: Rows | None = None,
    use_cache: bool = False,
    **options: Any,
) -> GenerationOutput:
    """Decode a canvas after each prompt, all of its reasoning slots at once.

    At every step each reasoning slot that has masks left commits its `tokens_per_step` most
    confident positions, as NAP's macro-parallel, micro-confidence schedule asks; the summary begins
    when the last of them is full. A committed token stays. The smallest budget of a step is one
    token per slot, unlike the paper's table, whose smallest is one token in all.

    Args:
        model: as for `spd_generate`.
        input_ids: as for `spd_generate`, prompts of one length.
        canvas: see `Canvas.build`.
        tokens_per_step: of each slot.
        block_length: the positions that see each other. Default: prompt and canvas are one block,
            as in the fully bidirectional models of the paper. For a block-diffusion model the
            length it was trained with; the canvas then has to fit after the prompt's tail.
        attention_mask: as for `spd_generate`.
        use_cache: keep keys and values of the prompt's whole blocks.
        options: passed on to `spd_generate` (ops, trace, mask_token_id, ...).

    Returns:
        As `spd_generate`, with max_new_tokens the canvas's length; `canvas.read` takes the slots
        out of its `sequences`. An end-of-sequence token inside a slot ends nothing.

    Raises:
        ValueError: a canvas that does not fit into a block, and whatever `spd_generate` rejects.
    """
    prompts = read_prompts(*unwrap(input_ids, attention_mask))
    lengths = sorted({len(prompt) for prompt in prompts})
    if len(lengths) > 1:
        raise ValueError(f"nap_generate: input_ids must be prompts of one length, got {lengths}")
    if block_length is None:
        block_length = lengths[0] + canvas.length
    need = "a positive integer or None"
    block_length = read_integer("nap_generate: block_length", block_length, need)
    tail = lengths[0] % block_length
    if tail + canvas.length > block_length:
        raise ValueError(
            f"nap_generate: canvas must fit into a block of {block_length} after {tail} tokens of "
            f"the prompt, got {canvas.length} positions"
        )
    check_model(model)
    device = embedding_device(model)
    return spd_generate(
        model,
        input_ids,
        attention_mask=attention_mask,
        block_length=block_length,
        max_new_tokens=canvas.length,
        rule=CanvasRule(canvas=canvas.to(device), tokens_per_step=tokens_per_step),
        eos_token_id=(),
        use_cache=use_cache,
        **options,
    )
