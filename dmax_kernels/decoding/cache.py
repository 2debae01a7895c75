"""A KV cache in which every row keeps its own place: slot j of a row holds its position j."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache


class BlockCache(Cache):
    """Keys and values in buffers [B, H, S, E] that never move, allocated at the first pass.

    `begin_pass` says where the tokens of a forward pass belong; the model's `update` writes them
    there and gets the first `visible` slots of its rows back. Each pass overwrites the slots of the
    live blocks: their soft states need no removal, and rows may be at different positions. The
    attention mask decides which slots a query sees; what was never written is zero, and later
    blocks are masked off.

    A CUDA graph needs fixed buffers. They also let rows leave by moving others into their place
    (`move_rows_`) instead of copying the cache.
    """

    def __init__(self, rows: int, length: int) -> None:
        # Cache.__init__ is not called: its arguments differ between transformers 4.5x and 5.x, and
        # what it sets up is overridden here, except the list of layers that its helpers read
        self.layers: list[Any] = []
        self.rows, self.length = rows, length
        self.keys: dict[int, Tensor] = {}  # layer: [B, H, S, E]
        self.values: dict[int, Tensor] = {}
        self.slots = torch.empty(0, 0, dtype=torch.int64)
        self.visible = 0

    def begin_pass(self, slots: Tensor, visible: int) -> None:
        """slots: int64 [b, Q], where the pass's tokens go; visible: how many slots it attends to.

        Slot `length` belongs to no position; what is written there is never seen.
        """
        self.slots, self.visible = slots, visible

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write [b, H, Q, E] of one layer; returns [b, H, visible, E] of keys and of values."""
        rows = torch.arange(key_states.shape[0], device=key_states.device).unsqueeze(-1)
        written = []
        for buffers, new in ((self.keys, key_states), (self.values, value_states)):
            if layer_idx not in buffers:
                _, heads, _, size = new.shape
                room = self.length + 1  # the last slot belongs to no position
                buffers[layer_idx] = new.new_zeros(self.rows, heads, room, size)
            buffer = buffers[layer_idx]
            # Layers may be on different devices
            buffer[rows, :, self.slots.to(new.device)] = new.transpose(1, 2)
            written.append(buffer[: len(rows), :, : self.visible])
        return written[0], written[1]

    def move_rows_(self, sources: Tensor, holes: Tensor) -> None:
        """Row sources[i] takes the place of row holes[i]."""
        for buffer in (*self.keys.values(), *self.values.values()):
            buffer[holes] = buffer[sources]

    def get_seq_length(self, layer_idx: int = 0, *args: Any) -> int:
        """Keys that a pass sees besides its own tokens; models add this to their input's length."""
        return self.visible - self.slots.shape[1]

    def get_usable_length(self, new_seq_length: int, layer_idx: int = 0) -> int:
        """The name of `get_seq_length` in remote code written before transformers 4.4x.

        Delete when no LLaDA2 checkpoint's code calls it (dInfer's and dFactory's copies do).
        """
        return self.get_seq_length()

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        return self.length

    def get_mask_sizes(self, *args: Any) -> tuple[int, int]:
        """(keys, offset), for models that make a mask when they are given none."""
        return self.visible, 0
