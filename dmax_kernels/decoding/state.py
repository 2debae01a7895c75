"""What one denoising step reads and writes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


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
    row: Tensor  # int64 [B]: which request of the batch this is, for a rule's random numbers
    start: Tensor  # int64 [B]: position of the block's first token in the row's sequence
    thresholds: Tensor  # float32 [B, 2]: (tau_dec, tau_acc) of the row

    @classmethod
    def fully_masked(
        cls,
        token: Tensor,
        prompt_tail: Tensor,
        embedding: Tensor,
        mask_token_id: int,
        *,
        row: Tensor,
        start: Tensor,
        thresholds: Tensor,
    ) -> BlockState:
        """The state before the first step: all masks, but for each row's tail of a prompt.

        token: [B, K], of which only the prompt's tail is read; prompt_tail: int64 [B], its length.
        """
        rows, length = token.shape
        position = torch.arange(length, device=token.device)
        editable = position >= prompt_tail.unsqueeze(-1)
        token = token.masked_fill(editable, mask_token_id)
        return cls(
            editable=editable,
            masked=editable.clone(),
            token=token,
            confidence=torch.where(editable, 0.0, 1.0),
            converged=torch.zeros(rows, dtype=torch.bool, device=token.device),
            step=torch.zeros(rows, dtype=torch.int32, device=token.device),
            inputs_embeds=F.embedding(token, embedding),
            row=row,
            start=start,
            thresholds=thresholds,
        )

    @property
    def tau_dec(self) -> Tensor:
        """[B, 1]"""
        return self.thresholds[:, 0:1]

    @property
    def tau_acc(self) -> Tensor:
        """[B, 1]"""
        return self.thresholds[:, 1:2]

    def spd_buffers(self) -> dict[str, Tensor]:
        """The buffers of `spd_step_`, by its argument names."""
        names = ("editable", "masked", "token", "confidence", "converged", "step", "inputs_embeds")
        return {name: getattr(self, name) for name in names}

    def select_rows(self, rows: Tensor) -> BlockState:
        """A copy of these rows."""
        return BlockState(**{name: buffer[rows] for name, buffer in vars(self).items()})

    def write_rows_(self, rows: Tensor, part: BlockState) -> None:
        """Put a copy made by `select_rows` back."""
        for name, buffer in vars(part).items():
            getattr(self, name)[rows] = buffer

    def commit_(self) -> None:
        """Stop every row where it is: the last top-1 of each position is its result."""
        self.masked.zero_()
        self.converged.fill_(True)
