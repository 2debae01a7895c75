"""Block-diffusion training layout: [noisy 1 | noisy 2 | ... | clean] in one sequence.

A noisy part holds the blocks that are learnt; its tokens see their own block of their own part,
noisy as it is, and the earlier blocks clean, which is what the decoder sees when it denoises a
block after committing those before it. The clean part is block-causal. Its last block is left out:
no other token looks at it. Only noisy parts go through the head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Places of a packed sequence; `length` clean positions, those from `start` on being learnt."""

    length: int
    start: int
    block_length: int
    num_noisy: int

    def __post_init__(self) -> None:
        for name in ("length", "start"):
            value = getattr(self, name)
            if value % self.block_length != 0:
                raise ValueError(
                    f"Layout: {name} must be a multiple of block_length {self.block_length}, "
                    f"got {value}"
                )
        if not 0 <= self.start < self.length:
            raise ValueError(
                f"Layout: start must lie in [0, length), got {self.start} of {self.length}"
            )

    @property
    def noisy_length(self) -> int:
        return self.length - self.start

    @property
    def position_ids(self) -> Tensor:
        """int64 [1, T]: a noisy token has the position of the clean token it stands for."""
        noisy = torch.arange(self.start, self.length)
        clean = torch.arange(self.length - self.block_length)
        return torch.cat([noisy] * self.num_noisy + [clean])[None]

    @property
    def attention_mask(self) -> Tensor:
        """bool [1, 1, T, T], True where the query (row) attends to the key (column)."""
        block = self.position_ids[0] // self.block_length
        part = torch.full_like(block, self.num_noisy)  # the clean part
        for i in range(self.num_noisy):
            part[i * self.noisy_length : (i + 1) * self.noisy_length] = i
        query_block, key_block = block[:, None], block[None, :]
        query_part, key_part = part[:, None], part[None, :]
        own_block = (query_part == key_part) & (query_block == key_block)
        earlier_clean = (key_part == self.num_noisy) & (key_block < query_block)
        return (own_block | earlier_clean)[None, None]

    def pack(self, noisy: list[Tensor], clean: Tensor) -> Tensor:
        """Token ids [B, T] from noisy parts [B, noisy_length] and clean tokens [B, length]."""
        return torch.cat([*noisy, clean[:, : self.length - self.block_length]], dim=1)

    def noisy_parts(self, states: Tensor) -> tuple[Tensor, ...]:
        """The noisy parts [B, noisy_length, ...] of per-token states [B, T, ...]."""
        return states[:, : self.num_noisy * self.noisy_length].chunk(self.num_noisy, dim=1)
