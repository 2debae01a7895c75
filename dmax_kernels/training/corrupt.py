"""Corruption of clean tokens: which positions become the mask token. A prompt never does."""

from __future__ import annotations

import torch
from torch import Tensor


def block_mask(editable: Tensor, block_length: int, generator: torch.Generator) -> Tensor:
    """Masks m positions of every block, m drawn from 1..K for each block: t in {1..K}/K.

    Args:
        editable: bool [B, L], L a multiple of `block_length` K; False (a prompt) is never masked.

    Returns:
        bool [B, L]. A block with E < K editable positions has ceil(m E / K) of them masked.
    """
    rows, length = editable.shape
    if length % block_length != 0:
        raise ValueError(
            f"block_mask: editable must hold whole blocks of {block_length} positions, got {length}"
        )
    blocks = editable.view(rows, -1, block_length)
    shape = blocks.shape
    drawn = torch.randint(1, block_length + 1, (*shape[:2], 1), generator=generator)
    count = (drawn * blocks.sum(-1, keepdim=True) + block_length - 1) // block_length
    # Positions in random order, the editable ones first: the first `count` of them are masked.
    score = torch.rand(shape, generator=generator, dtype=torch.float32).masked_fill(~blocks, 2.0)
    rank = score.argsort(-1).argsort(-1)
    return ((rank < count) & blocks).view(rows, length)


def uniform_mask(
    editable: Tensor, ratio: tuple[float, float], generator: torch.Generator
) -> Tensor:
    """Masks each editable position with probability t ~ Uniform(t_l, t_h), one per row (Sec. 3.1).

    Args:
        editable: bool [B, L]; False (a prompt) is never masked.
        ratio: (t_l, t_h), 0 <= t_l <= t_h <= 1. Equal bounds give a fixed ratio.
    """
    low, high = ratio
    if not 0 <= low <= high <= 1:
        raise ValueError(f"uniform_mask: ratio must satisfy 0 <= low <= high <= 1, got {ratio}")
    options = {"generator": generator, "dtype": torch.float32}
    level = low + (high - low) * torch.rand(editable.shape[0], 1, **options)
    return (torch.rand(editable.shape, **options) < level) & editable
