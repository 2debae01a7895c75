"""NAP's parallel-forced decoding of a canvas (arXiv 2602.23225, section 5.3, Eq. 5).

A canvas Y = [B_1, R_1, B_2, R_2, ..., B_m, R_m, B_S, S] has m reasoning slots R_j behind fixed
headers B_j, and a summary S. All of it lies in one block, where every position sees every other:
slots that do not read each other's finished tokens first are what makes the paths independent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dmax_kernels._numbers import as_integer, shown
from dmax_kernels.decoding.composed import Top1Rule
from dmax_kernels.decoding.embedding import embedding_device
from dmax_kernels.decoding.output import GenerationOutput
from dmax_kernels.decoding.promote import parallel_forced_promote
from dmax_kernels.decoding.prompts import Prompts, Rows, read_prompts, unwrap
from dmax_kernels.decoding.settings import check_model, read_integer
from dmax_kernels.decoding.spd import spd_generate
from dmax_kernels.decoding.state import LiveBlocks
from dmax_kernels.decoding.unmasking import set_count

if TYPE_CHECKING:
    from dmax_kernels.decoding.settings import Settings

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
            ValueError: no path, a length below 1, or another number of lengths than headers.
        """
        if len(headers) == 0 or len(headers) != len(slot_lengths):
            raise ValueError(
                "Canvas: slot_lengths must be one length for each of at least 1 header, got "
                f"{len(slot_lengths)} for {len(headers)}"
            )
        token: list[int] = []
        slot: list[int] = []
        parts = [*zip(headers, slot_lengths, strict=True), (summary_header, summary_length)]
        for number, (header, given) in enumerate(parts):
            length = as_integer(given)
            if length is None or length < 1:
                raise ValueError(
                    f"Canvas: the length of a slot must be a positive integer, got {shown(given)}"
                )
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
        """Of each row of decoded sequences [B, T + L] its slots' token ids, the summary's last."""
        slot = self.slot.to(sequences.device)
        return [
            [row[slot == number].tolist() for number in range(self.num_slots + 1)]
            for row in sequences[:, -self.length :]
        ]


@dataclass(frozen=True, eq=False)
class CanvasRule(Top1Rule):
    """Every reasoning slot advances at every step; the summary follows when they are done."""

    canvas: Canvas
    tokens_per_step: int = 1  # of each slot

    def __post_init__(self) -> None:
        set_count(self, "tokens_per_step")

    def begin_(
        self, state: LiveBlocks, rows: Tensor, embedding: Tensor, settings: Settings
    ) -> None:
        """Write the headers behind the prompt's tail, and padding behind the canvas."""
        index, inside = self._on_canvas(state.editable, 0)
        slot = torch.where(inside, self.canvas.slot[index], HEADER)
        fixed = torch.where(inside, self.canvas.token[index], settings.pad_token_id)
        begins = rows.unsqueeze(-1) & state.editable & (slot == HEADER)
        state.editable.logical_and_(~begins)
        state.masked.logical_and_(~begins)
        state.token.copy_(torch.where(begins, fixed, state.token))
        state.confidence.masked_fill_(begins, 1)
        embeds = F.embedding(state.token, embedding)
        state.inputs_embeds.copy_(torch.where(begins.unsqueeze(-1), embeds, state.inputs_embeds))

    def promote(
        self, token: Tensor, confidence: Tensor, state: LiveBlocks, settings: Settings
    ) -> Tensor:
        index, _ = self._on_canvas(state.editable, self.canvas.offset)
        return parallel_forced_promote(
            confidence,
            state.masked,
            self.canvas.slot[index],
            self.tokens_per_step,
            self.canvas.num_slots,
        )

    def _on_canvas(self, editable: Tensor, offset: int) -> tuple[Tensor, Tensor]:
        """Canvas index of each position of a block [B, K], and whether it lies on the canvas.

        The canvas begins `offset` positions before the first editable one; a prompt's tail differs
        in length from row to row, and a rule keeps nothing per row itself.
        """
        begin = (editable.cumsum(dim=-1) == 0).sum(dim=-1, keepdim=True) - offset
        index = torch.arange(editable.shape[-1], device=editable.device) - begin
        inside = (index >= 0) & (index < self.canvas.length)
        return index.clamp(0, self.canvas.length - 1), inside


def nap_generate(
    model: Any,
    input_ids: Prompts,
    canvas: Canvas,
    *,
    tokens_per_step: int = 1,
    block_length: int | None = None,
    attention_mask: Rows | None = None,
    use_cache: bool = False,
    **arguments: Any,
) -> GenerationOutput:
    """Decode a canvas behind each prompt, all of its reasoning slots at once.

    At every step each reasoning slot that has masks left commits its `tokens_per_step` most
    confident positions, as NAP's macro-parallel, micro-confidence schedule asks; the summary begins
    when the last of them is full. A token once committed stays. The smallest budget of a step is
    one token per slot: the paper's table of one token per step in all has no counterpart here.

    Args:
        model: as for `spd_generate`.
        input_ids: as for `spd_generate`, prompts of one length.
        canvas: see `Canvas.build`.
        tokens_per_step: of each slot.
        block_length: the positions that see each other. Default: prompt and canvas are one block,
            as in the fully bidirectional models of the paper. For a block-diffusion model the
            length it was trained with: then the canvas has to fit behind the prompt's tail.
        attention_mask: as for `spd_generate`.
        use_cache: keep keys and values of the prompt's whole blocks.
        arguments: passed on to `spd_generate` (ops, trace, mask_token_id, ...).

    Returns:
        As `spd_generate`, with max_new_tokens the canvas's length; `canvas.read` takes the slots
        out of its `sequences`. An end-of-sequence token inside a slot ends nothing.

    Raises:
        ValueError: a canvas that does not fit into a block, and whatever `spd_generate` rejects.
    """
    ids, attention_mask = unwrap(input_ids, attention_mask)
    lengths = sorted({len(prompt) for prompt in read_prompts(ids, attention_mask)})
    if len(lengths) > 1:
        raise ValueError(f"nap_generate: input_ids must be prompts of one length, got {lengths}")
    if block_length is None:
        block_length = lengths[0] + canvas.length
    block_length = read_integer("block_length", block_length, "a positive integer or None")
    tail = lengths[0] % block_length
    if tail + canvas.length > block_length:
        raise ValueError(
            f"nap_generate: canvas must fit into a block of {block_length} behind {tail} tokens of "
            f"the prompt, got {canvas.length} positions"
        )
    check_model(model)
    device = embedding_device(model)
    return spd_generate(
        model,
        ids,
        attention_mask=attention_mask,
        block_length=block_length,
        max_new_tokens=canvas.length,
        rule=CanvasRule(canvas.to(device), tokens_per_step),
        eos_token_id=(),
        use_cache=use_cache,
        **arguments,
    )
