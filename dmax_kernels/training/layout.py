"""The block-diffusion training layout: [noisy 1 | noisy 2 | ... | clean] in one sequence.

A noisy part holds the blocks that are learnt. Its tokens see all of their own block in their own
part, and the earlier blocks in the clean part: what the decoder sees when it denoises a block after
committing those before it. The clean part is block-causal. Its last block is left out because no
other token looks at it. Only noisy parts go through the head.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """The parts of a packed sequence: `length` clean positions, learnt from `start` on."""

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

    def pack(self, noisy_parts: list[Tensor], clean: Tensor) -> Tensor:
        """Token ids [B, T] from noisy parts [B, noisy_length] and clean tokens [B, length]."""
        return torch.cat([*noisy_parts, clean[:, : self.length - self.block_length]], dim=1)

    def noisy_parts(self, states: Tensor) -> tuple[Tensor, ...]:
        """The noisy parts [B, noisy_length, ...] of per-token states [B, T, ...]."""
        return states[:, : self.num_noisy * self.noisy_length].chunk(self.num_noisy, dim=1)

    def shifted_parts(self, states: Tensor) -> tuple[Tensor, ...]:
        """The same where the state at a position is the next one's: [B, T, ...], clean part too.

        The first position of a block is predicted at the last clean one before it, and the others
        in their own noisy part, as in decoding. Position 0 has none before it and gets its own.
        """
        clean = states[:, self.num_noisy * self.noisy_length :]
        last = torch.arange(self.start - 1, self.length - 1, self.block_length).clamp(min=0)
        first = clean[:, last.to(states.device)].unsqueeze(2)
        blocks = [part.unflatten(1, (-1, self.block_length)) for part in self.noisy_parts(states)]
        return tuple(torch.cat([first, each[:, :, :-1]], dim=2).flatten(1, 2) for each in blocks)


# From transformers' name of an attention to the kind of mask that it takes. None and "eager" add
# the mask to the scores. Flash Attention is absent: it takes no mask of [T, T] at all.
ATTENTION_OF = {"sdpa": "sdpa", "eager": "additive", None: "additive", "flex_attention": "flex"}


# One mask serves all rows and all batches of a shape. Eight shapes are kept: at 2 x 4096 tokens a
# boolean mask takes 64 MiB and an additive one of float32 takes 256.
@lru_cache(maxsize=8)
def attention_mask(
    layout: Layout, attention: str, device: torch.device, dtype: torch.dtype = torch.float32
) -> Any:
    """Which token attends to which, as the kind of mask that `attention` takes (`ATTENTION_OF`).

    For "sdpa", bool [1, 1, T, T] (True: attend). For "additive", the same with 0 for True and the
    lowest number of `dtype`, the dtype of the scores, for False. For "flex", a `BlockMask`.
    """
    block = layout.position_ids[0].to(device) // layout.block_length
    part = torch.full_like(block, layout.num_noisy)  # the clean part
    for i in range(layout.num_noisy):
        part[i * layout.noisy_length : (i + 1) * layout.noisy_length] = i

    def visible(row: Any, head: Any, query: Tensor, key: Tensor) -> Tensor:
        own_block = (part[query] == part[key]) & (block[query] == block[key])
        earlier_clean = (part[key] == layout.num_noisy) & (block[key] < block[query])
        return own_block | earlier_clean

    tokens = block.shape[0]
    if attention == "flex":
        from torch.nn.attention.flex_attention import create_block_mask

        return create_block_mask(visible, None, None, tokens, tokens, device=device)
    places = torch.arange(tokens, device=device)
    seen = visible(None, None, places[:, None], places[None, :])[None, None]
    if attention == "sdpa":
        return seen
    lowest = torch.finfo(dtype).min
    return torch.full(seen.shape, lowest, dtype=dtype, device=device).masked_fill_(seen, 0)
