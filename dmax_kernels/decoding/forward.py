"""The forward pass over one block, and the KV cache of the blocks before it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def block_causal_mask(
    begin: int, end: int, block_length: int, *, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Additive mask [1, 1, end - begin, end]: a query sees its own block and every earlier one.

    Blocks lie on the absolute grid of multiples of `block_length`, whatever the prompt's length.
    """
    key_block = torch.arange(end, device=device) // block_length
    visible = key_block <= key_block[begin:].unsqueeze(-1)
    mask = torch.full(visible.shape, -torch.inf, dtype=dtype, device=device)
    return mask.masked_fill_(visible, 0)[None, None]


class BlockForward:
    """Runs the model on a live block behind committed tokens.

    The cache only ever holds hard tokens of committed blocks. A live block's keys and values come
    from mask or soft embeddings, so they are cropped off after each pass; the block's hard tokens
    enter the cache with the first pass of the next block, which forwards both. With
    `use_cache=False` every pass reads the whole sequence: slow, and what the cache must agree with.
    """

    def __init__(self, model: Any, block_length: int, use_cache: bool) -> None:
        self.model = model
        self.embedding: Tensor = model.get_input_embeddings().weight.detach()  # [V, D]
        self.block_length = block_length
        self.use_cache = use_cache
        self.cache: Any = None
        self.cached = 0  # positions [0, cached) are in the cache

    def prefill(self, tokens: Tensor) -> None:
        """Put whole blocks of a prompt, tokens [B, n * K], into the empty cache."""
        if self.use_cache and tokens.shape[1] > 0:
            self._forward(F.embedding(tokens, self.embedding))
            self.cached = tokens.shape[1]

    def logits(self, tokens: Tensor, inputs_embeds: Tensor) -> Tensor:
        """Logits [B, K, V] of the block that follows the committed tokens [B, start]."""
        start, length = tokens.shape[1], inputs_embeds.shape[1]
        if self.cached < start:  # a block's first pass; without a cache, every pass
            hard = F.embedding(tokens[:, self.cached :], self.embedding)
            inputs_embeds = torch.cat([hard, inputs_embeds], dim=1)
        logits = self._forward(inputs_embeds)[:, -length:]
        if self.use_cache:
            self.cache.crop(-length)  # negative: how many to drop, in every transformers version
            self.cached = start
        return logits

    def select_rows(self, rows: Tensor) -> BlockForward:
        """The same for these rows of the batch alone; this one's cache stays as it is."""
        part = copy.copy(self)
        part.cache = None
        if self.cached > 0:  # a cache cropped to nothing would still insist on its old batch size
            part.cache = copy.deepcopy(self.cache)
            part.cache.batch_select_indices(rows)
        return part

    def _forward(self, inputs_embeds: Tensor) -> Tensor:
        begin, end = self.cached, self.cached + inputs_embeds.shape[1]
        device, rows = inputs_embeds.device, inputs_embeds.shape[0]
        mask = block_causal_mask(
            begin, end, self.block_length, dtype=inputs_embeds.dtype, device=device
        )
        output = self.model(
            inputs_embeds=inputs_embeds,
            attention_mask=mask.expand(rows, -1, -1, -1),
            position_ids=torch.arange(begin, end, device=device).expand(rows, -1),
            past_key_values=self.cache,
            use_cache=self.use_cache,
        )
        if self.use_cache:
            self.cache = getattr(output, "past_key_values", None)
            if not hasattr(self.cache, "crop"):
                raise ValueError(
                    "generate: the model must return past_key_values with a crop method when "
                    f"use_cache=True, got {type(self.cache).__name__}; pass use_cache=False"
                )
        return output.logits
