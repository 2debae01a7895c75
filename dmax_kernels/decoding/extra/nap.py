"""NAP's parallel-forced decoding of a canvas (arXiv 2602.23225, section 5.3, Eq. 5).

A canvas Y = [B_1, R_1, B_2, R_2, ..., B_m, R_m, B_S, S] has m reasoning slots R_j after fixed
headers B_j, and a summary S. All of it lies in one block, where every position sees every other.
The paths are independent because no slot reads the finished tokens of another one first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dmax_kernels._checks import read_integer, require
from dmax_kernels.decoding.config import RunConfig
from dmax_kernels.decoding.embedding import check_model, embedding_device
from dmax_kernels.decoding.output import GenerationOutput
from dmax_kernels.decoding.prompts import Prompts, Rows, read_prompts, unwrap
from dmax_kernels.decoding.rule_parts import FixedCount, best_in_turns
from dmax_kernels.decoding.spd import spd_generate
from dmax_kernels.decoding.state import LiveBlocks
from dmax_kernels.decoding.step import Seen

TAG = -1
OUTSIDE = -2


@dataclass(frozen=True, eq=False)
class Canvas:
    """Fixed tags and slots to decode, laid out in one row of L positions (Eq. 5)."""

    token: Tensor  # int64 [L]: the tags' tokens; not read inside the slots
    slot: Tensor  # int64 [L]: 0 ... m - 1 in the reasoning slots, m in the summary, -1 in tags
    num_slots: int  # m

    @classmethod
    def build(
        cls,
        headers: Sequence[Sequence[int]],
        slot_lengths: Sequence[int],
        summary_header: Sequence[int],
        summary_length: int,
        *,
        closings: Sequence[Sequence[int]] | None = None,
        summary_closing: Sequence[int] = (),
    ) -> Canvas:
        """Lay out each reasoning path between its tags, then the summary between its own.

        Args:
            headers: token ids of each path's header ("<think 1>"), which may be empty.
            slot_lengths: how many tokens each path has.
            summary_header: token ids of the summary's header.
            summary_length: how many tokens the summary has.
            closings: token ids of each path's closing tag ("</think 1>" in the paper's Figure 5).
                Default: none, as in Eq. 5.
            summary_closing: token ids of the summary's closing tag.

        Raises:
            ValueError: no path, a length below 1, or different numbers of lengths, headers and
                closing tags.
        """
        closings = [()] * len(headers) if closings is None else closings
        for what, several in (("slot_lengths", slot_lengths), ("closings", closings)):
            need = "one for each of at least 1 header"
            fits = len(headers) == len(several) > 0
            require(fits, f"Canvas: {what}", need, f"{len(several)} for {len(headers)}")
        token: list[int] = []
        slot: list[int] = []
        parts = [*zip(headers, slot_lengths, closings, strict=True)]
        parts.append((summary_header, summary_length, summary_closing))
        for number, (header, slot_length, closing) in enumerate(parts):
            what = "Canvas: the length of a slot"
            length = read_integer(what, slot_length, "a positive integer")
            token += [*header, *[0] * length, *closing]
            slot += [TAG] * len(header) + [number] * length + [TAG] * len(closing)
        return cls(
            torch.tensor(token, dtype=torch.int64, device="cpu"),
            torch.tensor(slot, dtype=torch.int64, device="cpu"),
            len(headers),
        )

    @property
    def length(self) -> int:
        return len(self.slot)

    def read(self, answer: Sequence[int] | Tensor) -> list[list[int]]:
        """The token ids of each slot, the summary's last, of one of the output's `answers`."""
        tokens = torch.as_tensor(answer, device="cpu")[: self.length]
        require(
            len(tokens) == self.length,
            "Canvas.read: answer",
            f"at least as long as the canvas, {self.length} tokens",
            len(tokens),
        )
        return [tokens[self.slot == number].tolist() for number in range(self.num_slots + 1)]


@dataclass(frozen=True, eq=False, kw_only=True)
class CanvasRule(FixedCount):
    """The reasoning slots of a row take turns at decoding; its summary follows when all are full.

    tokens_per_step: of a row, in all of its slots.
    slot, token: int64 [R, K], by the caller's prompts: where the canvas of each lies in its block.
        A slot is a number as in `Canvas`, or OUTSIDE before and after the canvas.
    summary: int64 [R, 1]: the number of each canvas's summary.
    """

    slot: Tensor
    token: Tensor
    summary: Tensor

    @classmethod
    def lay_out(
        cls,
        canvases: Sequence[Canvas],
        tails: Sequence[int],
        block_length: int,
        tokens_per_step: int,
        device: torch.device,
    ) -> CanvasRule:
        """Each canvas after its prompt's tail in a block of `block_length` positions."""
        shape = (len(canvases), block_length)
        slot = torch.full(shape, OUTSIDE, device="cpu")
        token = torch.zeros(shape, dtype=torch.int64, device="cpu")
        for row, (canvas, tail) in enumerate(zip(canvases, tails, strict=True)):
            places = slice(tail, tail + canvas.length)
            slot[row, places], token[row, places] = canvas.slot, canvas.token
        return cls(
            slot=slot.to(device),
            token=token.to(device),
            summary=torch.tensor([[canvas.num_slots] for canvas in canvases], device=device),
            tokens_per_step=tokens_per_step,
        )

    def begin_(self, state: LiveBlocks, rows: Tensor, embedding: Tensor, config: RunConfig) -> None:
        """Write the tags, and padding after the canvas."""
        slot, token = self.slot[state.row], self.token[state.row]
        fixed = token.masked_fill(slot == OUTSIDE, config.pad_token_id)
        begins = rows.unsqueeze(-1) & state.editable & (slot < 0)
        state.editable.logical_and_(~begins)
        state.masked.logical_and_(~begins)
        state.token.copy_(torch.where(begins, fixed, state.token))
        state.confidence.masked_fill_(begins, 1)
        embeds = F.embedding(state.token, embedding)
        state.inputs_embeds.copy_(torch.where(begins.unsqueeze(-1), embeds, state.inputs_embeds))

    def promote(self, seen: Seen) -> Tensor:
        slot = self.slot[seen.row]
        candidates = summary_last(seen.masked, slot == self.summary[seen.row])
        return best_in_turns(seen.confidence, candidates, self.tokens_per_step, slot)


def summary_last(masked: Tensor, is_summary: Tensor) -> Tensor:
    """masked [..., K], without the summary while another slot has a masked position."""
    reasoning = (masked & ~is_summary).any(dim=-1, keepdim=True)
    return masked & ~(is_summary & reasoning)


def nap_generate(
    model: Any,
    input_ids: Prompts,
    canvas: Canvas | Sequence[Canvas],
    *,
    tokens_per_step: int = 1,
    block_length: int | None = None,
    attention_mask: Rows | None = None,
    use_cache: bool = False,
    **options: Any,
) -> GenerationOutput:
    """Decode a canvas after each prompt, all of its reasoning slots at once.

    At every step a row commits `tokens_per_step` tokens. Its reasoning slots take turns, and in its
    turn a slot commits its most confident position: NAP's macro-parallel, micro-confidence
    schedule. A budget that the number of slots does not divide is carried over: with 3 slots, 2
    tokens per step go to slots 1 and 2, then 3 and 1, then 2 and 3. A slot that is full leaves its
    turns to the others, so that R reasoning tokens take ceil(R / tokens_per_step) steps; the
    summary then takes its own. A committed token stays.

    Args:
        model: as for `spd_generate`.
        input_ids: as for `spd_generate`.
        canvas: what follows every prompt, or one canvas for each; see `Canvas.build`.
        tokens_per_step: of a row, in all of its slots: the Tok/Step of the paper's Table 3.
        block_length: the positions that see each other. Default: prompt and canvas are one block,
            as in the fully bidirectional models of the paper; prompts must then have one length,
            and so must canvases. For a block-diffusion model the length it was trained with. The
            canvas then has to fit after the prompt's tail; padding fills the rest of the block.
        attention_mask: as for `spd_generate`.
        use_cache: keep keys and values of the prompt's whole blocks.
        options: passed on to `spd_generate` (ops, trace, mask_token_id, ...).

    Returns:
        As `spd_generate`, with max_new_tokens the longest canvas's length, to which shorter ones
        are padded; `canvas.read` takes the slots out of one of its `answers`. An end-of-sequence
        token inside a slot ends nothing.

    Raises:
        ValueError: not one canvas for each prompt, a canvas that does not fit into a block, prompts
            or canvases of several lengths without a block length, and whatever `spd_generate`
            rejects.
    """
    prompts = read_prompts(*unwrap(input_ids, attention_mask))
    canvases = [canvas] * len(prompts) if isinstance(canvas, Canvas) else list(canvas)
    require(
        len(canvases) == len(prompts) and all(isinstance(each, Canvas) for each in canvases),
        "nap_generate: canvas",
        f"a Canvas, or one for each of {len(prompts)} prompts",
        f"{len(canvases)} of them",
    )
    if block_length is None:
        for what, rows in (("input_ids", prompts), ("canvas", [c.slot for c in canvases])):
            lengths = sorted({len(row) for row in rows})
            need = "of one length where block_length is None"
            require(len(lengths) == 1, f"nap_generate: {what}", need, f"lengths {lengths}")
        block_length = len(prompts[0]) + canvases[0].length
    need = "a positive integer or None"
    block_length = read_integer("nap_generate: block_length", block_length, need)
    tails = [len(prompt) % block_length for prompt in prompts]
    longest = max(each.length for each in canvases)
    if max(tails) + longest > block_length:
        raise ValueError(
            f"nap_generate: canvas must fit into a block of {block_length} after {max(tails)} "
            f"tokens of the prompt, got {longest} positions"
        )
    check_model(model)
    device = embedding_device(model)
    return spd_generate(
        model,
        input_ids,
        attention_mask=attention_mask,
        block_length=block_length,
        max_new_tokens=longest,
        rule=CanvasRule.lay_out(canvases, tails, block_length, tokens_per_step, device),
        eos_token_id=(),
        use_cache=use_cache,
        **options,
    )
