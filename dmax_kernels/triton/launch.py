"""What every launch needs: rows without a copy, the split of a row over programs, the device."""

import contextlib
import functools
from typing import NamedTuple

import torch
from torch import Tensor

# Vocabulary tile of one reduction: at TILE_WARPS warps each thread holds 32 logits in registers. A
# constant, because a row's bits must not depend on the number of rows: a tile is always summed in
# one way, and tiles are always merged in one order, however programs share them.
TILE = 4096
TILE_WARPS = 4
# With a mask a thread also holds a word for each of its logits, for which four warps' registers
# would not do
MASKED_TILE_WARPS = 8


class Rows(NamedTuple):
    """[..., width] as rows of one stride (in elements)."""

    tensor: Tensor
    count: int
    width: int
    stride: int


def rows_collapse(t: Tensor) -> tuple[int, int] | None:
    """(rows, stride) where a row's elements are adjacent and the rows lie at one stride."""
    if t.shape[-1] > 1 and t.stride(-1) != 1:
        return None
    rows, row_stride = 1, None
    for size, stride in zip(reversed(t.shape[:-1]), reversed(t.stride()[:-1]), strict=True):
        if size == 1:
            continue
        if row_stride is None:
            row_stride = stride
        elif stride != row_stride * rows:
            return None
        rows *= size
    return rows, t.shape[-1] if row_stride is None else row_stride


def row_view(t: Tensor) -> Rows:
    collapsed = rows_collapse(t) if t.numel() > 0 else None
    if collapsed is None:
        t = t.contiguous()
        width = t.shape[-1]
        return Rows(t, t.numel() // width if width else 0, width, width)
    rows, stride = collapsed
    return Rows(t, rows, t.shape[-1], stride)


class Mask(NamedTuple):
    """The mask ``allowed`` of rows: int32 words, and from a row's words to the next row's."""

    words: Tensor | None
    stride: int  # 0: one row of words for all

    @property
    def given(self) -> bool:
        return self.words is not None

    @property
    def tile_warps(self) -> int:
        return TILE_WARPS if self.words is None else MASKED_TILE_WARPS


NO_MASK = Mask(None, 0)


def mask_of(allowed: Tensor | None) -> Mask:
    if allowed is None:
        return NO_MASK
    words = allowed.reshape(-1, allowed.shape[-1]).contiguous()
    return Mask(words, 0 if len(words) == 1 else words.shape[1])


@functools.cache
def num_multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1  # Triton's interpreter runs one program at a time
    return torch.cuda.get_device_properties(device).multi_processor_count


class Tiles(NamedTuple):
    """A row's vocabulary tiles, and how many of them one program takes."""

    count: int
    per_program: int
    programs: int


def choose_tiles(num_rows: int, vocab: int, device: torch.device) -> Tiles:
    """One tile per program until the device is full four times over, then up to eight.

    About eight programs of TILE_WARPS warps fit a multiprocessor. Not timed yet.
    """
    count = -(-vocab // TILE)
    full_device = num_multiprocessors(device) * 8 * 4
    per_program = max(1, min(8, num_rows * count // full_device))
    return Tiles(count, per_program, -(-count // per_program))


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def device_of(t: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(t.device) if t.is_cuda else contextlib.nullcontext()
