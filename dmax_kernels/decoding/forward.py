"""The forward pass over the live blocks of a batch, each row at its own place.

Shapes: b live rows, K block length, Q queries of a pass, S positions, V vocabulary, D hidden size.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dmax_kernels._checks import one_of, require
from dmax_kernels.decoding.embedding import FLOATS
from dmax_kernels.decoding.state import LiveBlocks

PREFILL_CHUNK = 2048  # positions: bounds the [b, 1, Q, S] mask of a long prompt


def block_causal_mask(
    position: Tensor, visible: int, block_length: int, dtype: torch.dtype
) -> Tensor:
    """Additive mask [b, 1, Q, visible]: a query sees its own block and every earlier one.

    position: int64 [b, Q]. Blocks lie on the absolute grid of multiples of `block_length`, whatever
    the prompt's length.
    """
    key_block = torch.arange(visible, device=position.device) // block_length
    seen = key_block <= (position // block_length).unsqueeze(-1)
    mask = torch.full(seen.shape, -torch.inf, dtype=dtype, device=position.device)
    return mask.masked_fill_(seen, 0).unsqueeze(1)


def cache_argument(model: Any) -> str:
    """What the model calls its KV cache: "cache" since transformers 5.24, before "past_key_values".

    Remote code keeps the old name. A wrapper whose forward names neither (PEFT's, torch's parallel
    ones) hands the argument on to a module inside it, which is the first that does name one.
    """
    for part in model.modules() if isinstance(model, nn.Module) else ():
        names = inspect.signature(part.forward).parameters
        for name in ("cache", "past_key_values"):
            if name in names:
                return name
    return "past_key_values"


class BlockForward:
    """Runs the model on one live block per row, after the row's committed tokens.

    The cache keeps only hard tokens of committed blocks. A live block's keys and values come from
    mask or soft embeddings and are overwritten by its next pass; once it is committed, a refreshing
    pass forwards its hard tokens together with the next block. With `use_cache=False` every pass
    reads whole sequences, which is slow, and which the cache must agree with.
    """

    def __init__(
        self,
        model: Any,
        embedding: Tensor,
        tokens: Tensor,
        block_length: int,
        use_cache: bool,
        shifted: bool = False,
    ) -> None:
        """embedding: [V, D]; tokens: int64 [B, S], prompts from position 0; S in whole blocks.

        shifted: the logits at a position are those of the next one.
        """
        self.model, self.shifted = model, shifted
        self.embedding = embedding
        self.tokens = tokens  # those committed so far; the rest is never seen
        self.offsets = torch.arange(block_length, device=tokens.device)
        self.cache: Any = None
        self.cache_argument = cache_argument(model)
        if use_cache:
            from dmax_kernels.decoding.cache import BlockCache  # imports transformers

            self.cache = BlockCache(*tokens.shape)

    def prefill(self, length: int) -> None:
        """Put the first `length` positions, whole blocks, into the cache.

        Rows with shorter prompts also forward positions of later blocks. Nothing sees these before
        those blocks' own passes overwrite them.
        """
        if self.cache is None:
            return
        # Without the head, whose logits [B, S, V] would go unread
        body = getattr(self.model, "base_model", self.model)
        rows = self.tokens.shape[0]
        for begin in range(0, length, PREFILL_CHUNK):
            end = min(begin + PREFILL_CHUNK, length)
            position = torch.arange(begin, end, device=self.tokens.device).expand(rows, -1)
            embeds = F.embedding(self.tokens[:, begin:end], self.embedding)
            self._forward(body, embeds, position, position, end)

    def logits(self, state: LiveBlocks, refresh: bool, visible: int) -> Tensor:
        """Logits [b, K, V] of the rows' live blocks. No host sync of its own.

        refresh: also forward the block before from its committed tokens, because some row's is not
        in the cache yet. visible: the largest end of a live block, or more.

        Shifted logits of a block's first position are those at the last position of the block
        before, which is forwarded for them. The first position of a sequence has none, and gets
        what comes; it is the prompt's, and nothing is decoded there.
        """
        rows, length = state.token.shape
        refresh = refresh or self.shifted
        position = state.start.unsqueeze(-1) + self.offsets  # [b, K]
        embeds = state.inputs_embeds
        if self.cache is None:
            whole = F.embedding(self.tokens[:rows, :visible], self.embedding)
            row = torch.arange(rows, device=position.device).unsqueeze(-1)
            whole[row, position] = embeds
            everything = torch.arange(visible, device=position.device).expand(rows, -1)
            at = (position - 1).clamp(min=0) if self.shifted else position
            return self._checked(
                self._forward(self.model, whole, everything, None, visible).logits[row, at]
            )
        slots = position
        if refresh:
            before = position - length
            known = before >= 0  # the first block of a sequence has none before it
            before = before.clamp(min=0)
            hard = F.embedding(self.tokens[:rows].gather(1, before), self.embedding)
            embeds = torch.cat([hard, embeds], dim=1)
            position = torch.cat([before, position], dim=1)
            slots = torch.cat([torch.where(known, before, self.tokens.shape[1]), slots], dim=1)
        output = self._forward(self.model, embeds, position, slots, visible)
        end = output.logits.shape[1] - self.shifted
        return self._checked(output.logits[:, end - length : end])

    def commit(self, state: LiveBlocks) -> None:
        """Keep the rows' current tokens; those of live blocks are overwritten later."""
        rows = state.token.shape[0]
        self.tokens[:rows].scatter_(1, state.start.unsqueeze(-1) + self.offsets, state.token)

    def move_rows_(self, sources: Tensor, holes: Tensor) -> None:
        self.tokens[holes] = self.tokens[sources]
        if self.cache is not None:
            self.cache.move_rows_(sources, holes)

    def _forward(
        self, model: Any, embeds: Tensor, position: Tensor, slots: Tensor | None, visible: int
    ) -> Any:
        if self.cache is not None:
            self.cache.begin_pass(slots, visible)
        block_length = len(self.offsets)
        output = model(
            inputs_embeds=embeds,
            attention_mask=block_causal_mask(position, visible, block_length, embeds.dtype),
            position_ids=position,
            use_cache=self.cache is not None,
            **{self.cache_argument: self.cache},
        )
        if self.cache is not None and not self.cache.keys:
            raise ValueError(
                f"spd_generate: the model must call {self.cache_argument}.update when "
                "use_cache=True, but did not; pass use_cache=False"
            )
        return output

    def _checked(self, logits: Tensor) -> Tensor:
        vocabulary = self.embedding.shape[0]
        require(
            logits.dtype in FLOATS, "spd_generate: the model's logits", one_of(FLOATS), logits.dtype
        )
        require(
            logits.shape[-1] == vocabulary,
            "spd_generate: the model's logits",
            f"over the {vocabulary} tokens of its input embedding",
            f"{logits.shape[-1]} (resize the embedding or the head)",
        )
        return logits.to(self.embedding.device)
