"""Logits of a sharded LM head, some columns at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dmax_kernels.distributed.layout import VocabShard, read_shard, visible

# How many bytes of float32 logits exist at a time, unless 4,096 columns of all rows take more
_BLOCK_BYTES = 64 << 20
_LEAST_COLUMNS = 4096


class Columns(NamedTuple):
    """``width`` ids of this rank's shard, starting at ``begin``; 0 past the shard's end."""

    begin: int
    width: int


class ShardedHead(NamedTuple):
    """This rank's rows of the LM head, without padding."""

    weight: Tensor  # [width, D]
    bias: Tensor | None
    shard: VocabShard

    def blocks(self, num_rows: int) -> Iterator[Columns]:
        """The same number of blocks on every rank: their results are gathered side by side."""
        columns = _BLOCK_BYTES // (4 * max(num_rows, 1)) // _LEAST_COLUMNS * _LEAST_COLUMNS
        columns = max(columns, _LEAST_COLUMNS)
        for begin in range(0, max(self.shard.sizes), columns):
            width = max(0, min(columns, self.shard.width - begin))
            yield Columns(min(begin, self.shard.width), width)

    def row_blocks(self, num_rows: int) -> Iterator[slice]:
        """Rows whose logits of the widest shard exist at a time; the same on every rank."""
        step = max(1, _BLOCK_BYTES // (4 * max(self.shard.sizes)))
        for begin in range(0, max(num_rows, 1), step):
            yield slice(begin, min(begin + step, num_rows))

    def logit_blocks(self, rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Columns of this rank and their logits, for what takes part in no collective."""
        for block in self.blocks(len(rows)):
            if block.width and len(rows):
                yield slice(block.begin, block.begin + block.width), self.logits(rows, block)

    def logits(self, hidden: Tensor, block: Columns) -> Tensor:
        """[rows, width], float32: products in the inputs' dtype, summed in float32."""
        weight = self.weight.narrow(0, *block)
        logits = float32_product(hidden, weight.t())
        return logits if self.bias is None else logits + self.bias.narrow(0, *block).float()


def float32_product(a: Tensor, b: Tensor) -> Tensor:
    with torch.autocast(a.device.type, enabled=False):  # autocast would round the result to 16 bits
        if a.is_cuda and a.dtype != torch.float32:
            return torch.mm(a, b, out_dtype=torch.float32)
        return a.float() @ b.float()


def read_head(
    op: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, group, shard_sizes, vocab_size
) -> ShardedHead:
    local, shard = read_shard(op, "weight", weight, 0, group, shard_sizes, vocab_size)
    if local.dim() != 2:
        raise ValueError(f"{op}: weight must be [V_shard, D], got {list(local.shape)}")
    if hidden.dim() < 1 or hidden.shape[-1] != local.shape[1]:
        raise ValueError(
            f"{op}: hidden must be [..., D] with D = {local.shape[1]} as in weight, "
            f"got {list(hidden.shape)}"
        )
    if bias is not None:
        bias, bias_shard = read_shard(op, "bias", bias, 0, group, shard_sizes, vocab_size)
        if bias_shard != shard:
            raise ValueError(f"{op}: bias must be sharded as weight is, {shard}, got {bias_shard}")
        bias = visible(bias, shard, 0)
    for name, tensor in (("weight", local), ("bias", bias)):
        if tensor is not None and tensor.dtype != hidden.dtype:
            raise ValueError(
                f"{op}: {name} must have hidden's dtype, {hidden.dtype}, got {tensor.dtype}"
            )
    return ShardedHead(visible(local, shard, 0), bias, shard)
