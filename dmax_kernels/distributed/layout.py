"""Which ids each rank holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class VocabShard:
    """Contiguous shards in rank order; ids from ``vocab_size`` on do not exist."""

    group: dist.ProcessGroup | None
    rank: int
    sizes: tuple[int, ...]  # of every rank's tensor, padding included
    vocab_size: int

    @property
    def num_ranks(self) -> int:
        return len(self.sizes)

    @property
    def start(self) -> int:
        return sum(self.sizes[: self.rank])

    @property
    def width(self) -> int:
        """Ids on this rank that exist."""
        return self.width_of(self.rank)

    def width_of(self, rank: int) -> int:
        return max(0, min(self.sizes[rank], self.vocab_size - sum(self.sizes[:rank])))


def _group_rank_and_size(op: str, group: dist.ProcessGroup | None) -> tuple[int, int]:
    if not (dist.is_available() and dist.is_initialized()):
        if group is not None:
            raise ValueError(
                f"{op}: group must be None before torch.distributed.init_process_group, got {group}"
            )
        return 0, 1
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError(
            f"{op}: group must contain this rank, got one without rank {dist.get_rank()}"
        )
    return rank, dist.get_world_size(group)


def _shard_of_dtensor(op: str, name: str, tensor, dim: int, group) -> tuple[Tensor, VocabShard]:
    from torch.distributed.tensor import Shard

    dim %= tensor.dim()
    on_vocab = [
        i
        for i, placement in enumerate(tensor.placements)
        if type(placement) is Shard and placement.dim % tensor.dim() == dim
    ]
    if len(on_vocab) != 1 or any(placement.is_partial() for placement in tensor.placements):
        raise ValueError(
            f"{op}: {name} must be a DTensor with Shard({dim}) on one mesh dimension and no "
            f"Partial, got {tuple(tensor.placements)}"
        )
    mesh_dim = on_vocab[0]
    mesh_group = tensor.device_mesh.get_group(mesh_dim)
    if group is not None and group is not mesh_group:
        raise ValueError(
            f"{op}: group must be None or the group of {name}'s mesh, got a different one"
        )
    rank, num_ranks = _group_rank_and_size(op, mesh_group)
    # As torch.chunk cuts: the first shards are full, the last ones shorter or empty
    vocab = tensor.shape[dim]
    full = -(-vocab // num_ranks)
    sizes = tuple(max(0, min(full, vocab - r * full)) for r in range(num_ranks))
    return tensor.to_local(), VocabShard(mesh_group, rank, sizes, vocab)


def _is_dtensor(tensor: Tensor) -> bool:
    if type(tensor) is Tensor or not dist.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def read_shard(
    op: str,
    name: str,
    tensor: Tensor,
    dim: int,
    group: dist.ProcessGroup | None,
    shard_sizes: Sequence[int] | None,
    vocab_size: int | None,
) -> tuple[Tensor, VocabShard]:
    """This rank's plain tensor and the layout, from the arguments that all functions share."""
    if tensor.dim() < 1:
        raise ValueError(f"{op}: {name} must have a vocabulary dimension, got a 0-D tensor")
    if tensor.dtype not in FLOATS:
        raise ValueError(f"{op}: {name} must be float32, bfloat16 or float16, got {tensor.dtype}")
    if _is_dtensor(tensor):
        if shard_sizes is not None:
            raise ValueError(f"{op}: shard_sizes must be None for a DTensor, got {shard_sizes}")
        local, shard = _shard_of_dtensor(op, name, tensor, dim, group)
    else:
        local = tensor
        rank, num_ranks = _group_rank_and_size(op, group)
        sizes = (tensor.shape[dim],) * num_ranks if shard_sizes is None else tuple(shard_sizes)
        if len(sizes) != num_ranks or min(sizes) < 0:
            raise ValueError(
                f"{op}: shard_sizes must be {num_ranks} widths, one per rank, got {list(sizes)}"
            )
        shard = VocabShard(group, rank, sizes, sum(sizes))
    if local.shape[dim] != shard.sizes[shard.rank]:
        raise ValueError(
            f"{op}: {name} must be {shard.sizes[shard.rank]} ids wide on rank {shard.rank} "
            f"(shard_sizes {list(shard.sizes)}), got {local.shape[dim]}"
        )
    if vocab_size is not None:
        if not 1 <= vocab_size <= shard.vocab_size:
            raise ValueError(
                f"{op}: vocab_size must be in 1..{shard.vocab_size}, the ids that shards of "
                f"{list(shard.sizes)} hold, got {vocab_size}"
            )
        shard = VocabShard(shard.group, shard.rank, shard.sizes, vocab_size)
    if shard.vocab_size < 1:
        raise ValueError(f"{op}: {name} must hold at least one id on some rank, got none")
    return local, shard


def gather_shard_sizes(
    tensor: Tensor, *, dim: int = -1, group: dist.ProcessGroup | None = None
) -> tuple[int, ...]:
    """The width of every rank's shard, for ``shard_sizes``: one collective and a host sync.

    Call it once, when the model is loaded: ``dim`` is -1 for logits, 0 for an LM head or an
    embedding table.

    Raises:
        ValueError: dtypes or other dimensions that differ between ranks, on every rank alike.
    """
    op = "gather_shard_sizes"
    _, num_ranks = _group_rank_and_size(op, group)
    dim %= tensor.dim()
    others = [size for d, size in enumerate(tensor.shape) if d != dim]
    mine = (tensor.shape[dim], (str(tensor.dtype).removeprefix("torch."), others))
    by_rank = [mine] * num_ranks
    if num_ranks > 1:
        dist.all_gather_object(by_rank, mine, group)
    kinds = [kind for _, kind in by_rank]
    if any(kind != kinds[0] for kind in kinds):
        raise ValueError(
            f"{op}: the ranks' tensors must have one dtype and the same sizes except the "
            f"vocabulary's, got {', '.join(f'{dtype} {sizes}' for dtype, sizes in kinds)}"
        )
    return tuple(size for size, _ in by_rank)


def visible(tensor: Tensor, shard: VocabShard, dim: int) -> Tensor:
    """The ids that exist; a view."""
    return tensor.narrow(dim, 0, shard.width)


def check_suppress_token(op: str, suppress_token: int, shard: VocabShard) -> None:
    if not -1 <= suppress_token < shard.vocab_size:
        raise ValueError(
            f"{op}: suppress_token must be -1 (none) or a token id below {shard.vocab_size}, "
            f"got {suppress_token}"
        )


def at_least_one_column(logits: Tensor) -> Tensor:
    """Give an empty shard one column of -inf: no mass, never chosen, and passes the same checks."""
    if logits.shape[-1] > 0:
        return logits
    return logits.new_full((*logits.shape[:-1], 1), -torch.inf)
