"""One collective per op: several small results as the bits of one int32 tensor."""

import torch
import torch.distributed as dist
from torch import Tensor

from dmax_kernels.distributed.layout import FLOATS, VocabShard

# The old name warns since PyTorch 2.13. Delete it when 2.10 to 2.12 are no longer supported
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def _header(shard: VocabShard, dtype: torch.dtype, like: Tensor) -> list[Tensor]:
    """What must agree between ranks; nothing on a GPU, where reading it would be a host sync."""
    if like.device.type != "cpu":
        return []
    return [torch.tensor([shard.sizes[shard.rank], FLOATS.index(dtype)], dtype=torch.int32)]


def _check_headers(op: str, shard: VocabShard, headers: Tensor) -> None:
    """headers: [ranks, 2], the same on every rank, so that all of them raise or none does."""
    widths, dtypes = headers.t().tolist()
    if len(set(dtypes)) > 1:
        names = [str(FLOATS[code]).removeprefix("torch.") for code in dtypes]
        raise ValueError(f"{op}: every rank's shard must have one dtype, got {names}")
    if widths != list(shard.sizes):
        raise ValueError(
            f"{op}: the ranks' shards are {widths} ids wide, rank {shard.rank} took them to be "
            f"{list(shard.sizes)}; pass shard_sizes={widths} on every rank"
        )


class _NoGradient(torch.autograd.Function):
    """A gathered tensor, on the graph of what this rank has sent, with no way back along it."""

    @staticmethod
    def forward(ctx, op, gathered, sent):
        ctx.op = op
        return gathered.view_as(gathered)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(f"{ctx.op}: has no gradient over a sharded vocabulary")


def gather(
    op: str, shard: VocabShard, dtype: torch.dtype, fields: tuple[Tensor, ...]
) -> list[Tensor]:
    """Every rank's fields, [ranks, ...] each; ``dtype`` is the sharded tensor's.

    A backward pass through what it returns raises: otherwise whatever a loss has from it would
    silently be missing from the gradient.
    """
    if shard.num_ranks == 1:
        return [field.unsqueeze(0) for field in fields]
    header = _header(shard, dtype, fields[0])
    # Bits, not values: as float32, ids would be exact only up to 2^24
    parts = header + [field.contiguous().view(-1).view(torch.int32) for field in fields]
    payload = torch.cat(parts)
    gathered = payload.new_empty(shard.num_ranks * payload.numel())
    _all_gather(gathered, payload, group=shard.group)
    columns = [
        column.clone(memory_format=torch.contiguous_format)
        for column in gathered.view(shard.num_ranks, -1).split(
            [part.numel() for part in parts], dim=1
        )
    ]
    if header:
        _check_headers(op, shard, columns.pop(0))
    received = [
        column.view(-1).view(field.dtype).view(shard.num_ranks, *field.shape)
        for column, field in zip(columns, fields, strict=True)
    ]
    return [
        _NoGradient.apply(op, column, field) if field.requires_grad else column
        for column, field in zip(received, fields, strict=True)
    ]


def gather_logits(op: str, shard: VocabShard, logits: Tensor) -> Tensor:
    """The logits [..., V] of all ranks, from this rank's columns; those that exist."""
    if shard.num_ranks > 1:
        widest = max(shard.sizes)
        widest += widest % 2  # 16-bit floats travel in pairs
        padded = torch.nn.functional.pad(logits, (0, widest - logits.shape[-1]))
        (gathered,) = gather(op, shard, logits.dtype, (padded,))
        columns = [part[..., :width] for part, width in zip(gathered, shard.sizes, strict=True)]
        logits = torch.cat(columns, dim=-1)
    return logits[..., : shard.vocab_size]


def check_layout(op: str, shard: VocabShard, like: Tensor) -> None:
    """The check of gather(), before a choice that depends on the ranks' widths: ranks that take
    them to be different would wait for each other.
    """
    if shard.num_ranks > 1 and like.device.type == "cpu":
        gather(op, shard, like.dtype, (like.new_empty(0),))


def sum_of_disjoint(op: str, shard: VocabShard, rows: Tensor) -> Tensor:
    """The sum over ranks; at each position at most one rank's tensor is not zero.

    They are added as integers, which leaves the bits unchanged whatever the dtype is.
    """
    if shard.num_ranks == 1:
        return rows
    flat = rows.contiguous().view(-1)
    if flat.numel() * flat.element_size() % 4:
        flat = torch.cat([flat, flat.new_zeros(1)])
    bits = flat.view(torch.int32)
    header = []
    for mine in _header(shard, rows.dtype, rows):
        table = mine.new_zeros(shard.num_ranks, 2)
        table[shard.rank] = mine
        header.append(table.view(-1))
    payload = torch.cat([*header, bits])
    dist.all_reduce(payload, group=shard.group)
    if header:
        _check_headers(op, shard, payload[: header[0].numel()].view(-1, 2))
        payload = payload[header[0].numel() :].clone()
    return payload.view(rows.dtype)[: rows.numel()].view(rows.shape)


def sum_over_ranks(shard: VocabShard, tensor: Tensor) -> Tensor:
    if shard.num_ranks > 1:
        dist.all_reduce(tensor, group=shard.group)
    return tensor
