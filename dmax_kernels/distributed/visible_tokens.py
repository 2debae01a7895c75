"""Which tokens of a sharded vocabulary count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from dmax_kernels import ops
from dmax_kernels.distributed.layout import (
    VocabShard,
    check_suppress_token,
    read_shard,
    visible,
)
from dmax_kernels.vocabulary import mask_words, shard_mask, visible_tokens


class VisibleTokens(NamedTuple):
    """Which tokens of the whole vocabulary count."""

    suppress_token: int
    allowed: Tensor | None

    def partial(self, logits: Tensor, start: int, temperature: float) -> tuple[Tensor, ...]:
        """top1_partial() of the ids from ``start`` on."""
        allowed = self.allowed
        if allowed is not None:
            allowed = shard_mask(allowed, start, logits.shape[-1])
        return ops.top1_partial(
            logits, start, temperature=temperature, suppress_token=self.suppress_token,
            allowed=allowed,
        )  # fmt: skip


def read_visible(
    op: str, shard: VocabShard, device: torch.device, suppress_token: int,
    suppress_tokens: Sequence[int], allowed: Tensor | None, *, as_mask: bool = False,
) -> VisibleTokens:  # fmt: skip
    check_suppress_token(op, suppress_token, shard)
    words = mask_words(shard.vocab_size)
    if allowed is not None and allowed.shape[-1] != words:
        raise ValueError(
            f"{op}: allowed must be int32 [..., {words}], a bit for each of "
            f"{shard.vocab_size} tokens, got {list(allowed.shape)}"
        )
    _, suppress_token, allowed = visible_tokens(
        op, shard.vocab_size, device, suppress_token, suppress_tokens, allowed, as_mask=as_mask
    )
    return VisibleTokens(suppress_token, allowed)


def read_masked_logits(
    op: str, logits: Tensor, group: ProcessGroup | None, shard_sizes: Sequence[int] | None,
    vocab_size: int | None, suppress_token: int, suppress_tokens: Sequence[int],
    allowed: Tensor | None,
) -> tuple[Tensor, VocabShard, Tensor | None]:  # fmt: skip
    """This rank's columns that exist, the layout, and the whole vocabulary's mask (None: all)."""
    mine, shard = read_shard(op, "logits", logits, -1, group, shard_sizes, vocab_size)
    which = read_visible(
        op, shard, mine.device, suppress_token, suppress_tokens, allowed, as_mask=True
    )
    return visible(mine, shard, -1), shard, which.allowed
