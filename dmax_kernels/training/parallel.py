"""Several processes, started by torchrun: FSDP2 shards the model and averages the gradients."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from dmax_kernels.training.config import TrainConfig
from dmax_kernels.training.model import decoder_layers
from dmax_kernels.training.oput import Objective


@dataclass(frozen=True)
class Processes:
    """This process among those of the run."""

    rank: int
    count: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums over the processes, the same on each."""
        if self.count == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def share(self, batch_size: int, micro_batch_size: int | None) -> int:
        """The micro batch size; each process must get the same number of whole micro batches."""
        if micro_batch_size is None:
            micro_batch_size = batch_size // self.count
        if micro_batch_size == 0 or batch_size % (micro_batch_size * self.count) != 0:
            raise ValueError(
                "batch_size must be a multiple of micro_batch_size times the number of processes, "
                f"got {batch_size} for {micro_batch_size} x {self.count}"
            )
        return micro_batch_size


@contextmanager
def processes(device: str | None) -> Iterator[Processes]:
    """The processes that torchrun started, or this one alone."""
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device must be cpu where torch finds no GPU, got cuda")
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield Processes(0, 1, torch.device(name))
        return
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(name)
    # gloo serves tensors on the CPU, such as those of a checkpoint's plan
    dist.init_process_group("cpu:gloo,cuda:nccl" if name.startswith("cuda") else "gloo")
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), torch.device(name))
    finally:
        dist.destroy_process_group()


def shard(objective: Objective, config: TrainConfig, group: Processes) -> None:
    """FSDP2: a layer is gathered when it runs; embedding, norm and head when the objective runs.

    FSDP averages gradients over the processes, so the loop multiplies its loss by their number.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy()
    if config.precision == "bf16-master":  # the shards are the float32 master weights
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    mesh = init_device_mesh(group.device.type, (group.count,))
    for layer in decoder_layers(objective.net.model):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(objective, mesh=mesh, mp_policy=policy)


def whole_weights(model: nn.Module, dtype: torch.dtype, keep: bool) -> dict[str, torch.Tensor]:
    """The gathered state dict, or an empty one without `keep`. Every process must call it."""
    gathered = {}
    for name, value in model.state_dict().items():
        whole = value.full_tensor() if hasattr(value, "full_tensor") else value
        if keep:
            whole = whole.detach().cpu()
            gathered[name] = whole.to(dtype) if whole.is_floating_point() else whole
    return gathered
