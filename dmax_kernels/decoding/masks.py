"""The tokens that a caller allows: a grammar's bit masks, asked for block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from dmax_kernels.decoding.state import LiveBlocks
from dmax_kernels.vocabulary import mask_words

if TYPE_CHECKING:
    from dmax_kernels.decoding.batch import Request


@dataclass(frozen=True)
class NextBlock:
    """The block that a row begins, as `spd_generate(allowed=...)` receives it."""

    row: int  # of the caller's prompts
    token_ids: list[int]  # the answer so far
    length: int  # positions that the block decodes, of which an answer may take fewer


class BlockMasks:
    """Asks for the masks of blocks that begin, and keeps those of the live ones in the state."""

    def __init__(self, allowed: Callable[[NextBlock], Tensor | None], vocabulary: int) -> None:
        self.allowed, self.words = allowed, mask_words(vocabulary)

    def buffers(self, rows: int, block_length: int, device: torch.device) -> dict[str, Tensor]:
        """`LiveBlocks.masks` with every token allowed."""
        shape = (rows, block_length, self.words)
        return {"allowed": torch.full(shape, -1, dtype=torch.int32, device=device)}

    def begin_(self, state: LiveBlocks, requests: Iterable[tuple[int, Request]]) -> None:
        """Take the masks of the blocks that begin: (row of the batch, its request) each."""
        buffer = state.masks["allowed"]
        block_length = buffer.shape[1]
        for i, request in requests:
            tail = max(request.prompt_length - request.start, 0)
            length = block_length - tail
            mask = self.allowed(NextBlock(request.row, list(request.answer), length))
            if mask is None:
                buffer[i].fill_(-1)
                continue
            buffer[i, tail:].copy_(self._checked(mask, request.row, length))

    def _checked(self, mask: Tensor, row: int, length: int) -> Tensor:
        """The mask as [length or 1, words]; tokens beyond its last word are not allowed."""
        need = (
            f"spd_generate: allowed must return int32 [{self.words}] or [{length}, {self.words}] "
            f"(a bit per token; fewer words allow no token beyond them) or None for row {row},"
        )
        if not isinstance(mask, Tensor) or mask.dtype != torch.int32:
            raise ValueError(f"{need} got {getattr(mask, 'dtype', type(mask).__name__)}")
        given = mask if mask.dim() == 2 else mask.unsqueeze(0)
        fits = mask.dim() in (1, 2) and len(given) in (1, length)
        if not fits or not 1 <= given.shape[-1] <= self.words:
            raise ValueError(f"{need} got {list(mask.shape)}")
        if given.device.type == "cpu" and not (given != 0).any(dim=-1).all():
            raise ValueError(
                f"spd_generate: allowed must leave a token at every position of row {row}'s block, "
                "got a mask without one"
            )
        return F.pad(given, (0, self.words - given.shape[-1]))
