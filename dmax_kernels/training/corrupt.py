"""Batches of clean tokens, and what a training step corrupts in them.

Everything that is random in a step is drawn here, on the CPU, for the whole batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORE = -100  # the target at a position whose token is not learnt


@dataclass(frozen=True)
class TrainBatch:
    """Clean tokens x_0 in whole blocks of K positions: [prompt | response | eos ... | eos ...].

    Rows differ in length. A row's own last block is filled with end-of-sequence tokens, as the
    decoder fills it. The blocks after it are padding, which no token of the row attends to because
    attention is causal between blocks. Padding therefore needs no mask.
    """

    tokens: Tensor  # int64 [B, L]
    editable: Tensor  # bool [B, L]: response and tail, which may be masked; never the prompt
    target: Tensor  # int64 [B, L]: the token where it is learnt, elsewhere IGNORE
    block_length: int  # K

    @property
    def start(self) -> int:
        """The first position of the first block in which any row may be masked."""
        first = int(self.editable.any(0).nonzero()[0])
        return first // self.block_length * self.block_length

    @property
    def learnt(self) -> Tensor:
        """bool [B, L]"""
        return self.target != IGNORE

    def rows(self, index: Sequence[int], device: torch.device) -> TrainBatch:
        """These rows up to the last block in which any of them may be masked; tokens on `device`.

        The other tensors stay on the CPU, where they are turned into indices without a sync.
        """
        chosen = torch.as_tensor(index)
        last = int(self.editable[chosen].any(0).nonzero()[-1])
        end = (last // self.block_length + 1) * self.block_length
        return TrainBatch(
            self.tokens[chosen, :end].to(device),
            self.editable[chosen, :end],
            self.target[chosen, :end],
            self.block_length,
        )


# Which positions become the mask token, and with which probability t they did. A prompt never does.


def uniform_mask(
    editable: Tensor, ratio: tuple[float, float], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Masks editable positions with probability t ~ Uniform(t_l, t_h), one t per row (Sec. 3.1).

    Args:
        editable: bool [B, L]; False (a prompt) is never masked.
        ratio: (t_l, t_h), 0 <= t_l <= t_h <= 1. Equal bounds give a fixed ratio.

    Returns:
        bool [B, L], and t, float32 [B, L].
    """
    low, high = ratio
    if not 0 <= low <= high <= 1:
        raise ValueError(f"uniform_mask: ratio must satisfy 0 <= low <= high <= 1, got {ratio}")
    options: dict[str, Any] = {"generator": generator, "dtype": torch.float32}
    level = low + (high - low) * torch.rand(editable.shape[0], 1, **options)
    masked = (torch.rand(editable.shape, **options) < level) & editable
    return masked, level.expand(editable.shape)


def block_mask(
    editable: Tensor, block_length: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Masks m positions of every block, with m drawn from 1..K for each block: t in {1..K}/K.

    Args:
        editable: bool [B, L], L a multiple of `block_length` K; False (a prompt) is never masked.

    Returns:
        bool [B, L], and t, float32 [B, L]. In a block with E < K editable positions, ceil(m E / K)
        of them are masked, and t is their share of E. A block without any has t = 1.
    """
    rows, length = editable.shape
    if length % block_length != 0:
        raise ValueError(
            f"block_mask: editable must hold whole blocks of {block_length} positions, got {length}"
        )
    blocks = editable.view(rows, -1, block_length)
    shape = blocks.shape
    drawn = torch.randint(1, block_length + 1, (*shape[:2], 1), generator=generator)
    available = blocks.sum(-1, keepdim=True)
    count = (drawn * available + block_length - 1) // block_length
    # Put the positions in random order, the editable ones first, and mask the first `count`.
    score = torch.rand(shape, generator=generator, dtype=torch.float32).masked_fill(~blocks, 2.0)
    rank = score.argsort(-1).argsort(-1)
    masked = ((rank < count) & blocks).view(rows, length)
    level = torch.where(available > 0, count.float() / available.clamp(min=1).float(), 1.0)
    return masked, level.expand(shape).reshape(rows, length)


@dataclass(frozen=True)
class CorruptedBatch:
    """A batch with everything that is random in its step.

    All of it is drawn for the whole batch, before the batch is divided into rows. Neither micro
    batches nor the number of processes therefore change what is masked or what the rollout draws.
    """

    batch: TrainBatch
    masks: tuple[Tensor, ...]  # bool [B, L] each: one per corruption
    weights: tuple[Tensor, ...] | None  # float32 [B, L] each: of a position's loss; None for 1
    seeds: Tensor  # int64 [B, L, 2]: (seed, offset) of the draw at each position
    passes: tuple[bool, bool]  # whether the masked and the second pass run in this step
    divisor: float  # of the batch's summed loss: the positions, or sequences, that it averages

    @classmethod
    def from_start(
        cls,
        batch: TrainBatch,
        masks: Sequence[Tensor],
        generator: torch.Generator,
        passes: tuple[bool, bool],
        divisor: float,
        weights: Sequence[Tensor] | None = None,
    ) -> CorruptedBatch:
        """Completes tensors [B, L - start], drawn for the positions from `batch.start` on."""
        key = torch.randint(2**62, (), generator=generator)
        offset = torch.arange(masks[0].numel()).view(masks[0].shape)
        seeds = torch.stack([key.expand_as(offset), offset], dim=-1)
        start = batch.start
        return cls(
            batch,
            tuple(F.pad(masked, (start, 0)) for masked in masks),
            None if weights is None else tuple(F.pad(each, (start, 0)) for each in weights),
            F.pad(seeds, (0, 0, start, 0)),
            passes,
            divisor,
        )

    def rows(self, index: Sequence[int], device: torch.device) -> CorruptedBatch:
        """These rows, see `TrainBatch.rows`."""
        batch, chosen = self.batch.rows(index, device), torch.as_tensor(index)
        kept = chosen, slice(batch.tokens.shape[1])
        return CorruptedBatch(
            batch,
            tuple(masked[kept] for masked in self.masks),
            None if self.weights is None else tuple(each[kept] for each in self.weights),
            self.seeds[kept],
            self.passes,
            self.divisor,
        )


def step_generator(seed: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def flat_index(chosen: Tensor, device: torch.device) -> Tensor:
    """Indices, on `device`, of the True entries of a CPU mask that is flattened.

    Indexing with a mask on a GPU would wait for the GPU to count its entries.
    """
    return chosen.flatten().nonzero().squeeze(1).to(device)
