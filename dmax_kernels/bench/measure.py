"""Measures a workload: its candidates in one run, against the floor measured in the same run."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from dmax_kernels.bench import gpu_timer, timer
from dmax_kernels.bench.workload import Work


@dataclass
class Machine:
    """What the device at hand can do, measured once in this run."""

    device: str = "cpu"
    _matrix_rates: dict[torch.dtype, float] = field(default_factory=dict)

    @cached_property
    def copy_bandwidth(self) -> float:
        """Bytes per second: of a copy on a GPU (read and written)."""
        return gpu_timer.copy_bandwidth()

    def matrix_rate(self, dtype: torch.dtype) -> float:
        """FLOP per second of PyTorch's product of two large square matrices."""
        if dtype not in self._matrix_rates:
            module = gpu_timer if self.device == "cuda" else timer
            self._matrix_rates[dtype] = module.multiply_rate(dtype)
        return self._matrix_rates[dtype]

    def seconds_to_move(self, nbytes: int) -> float:
        """The floor of work that moves so many bytes. On a CPU a read of as many, cached if the
        candidates' input is."""
        if self.device == "cuda":
            return nbytes / self.copy_bandwidth
        return timer.read_seconds(nbytes)


def measure(
    work: Work, machine: Machine, *, repetitions: int = 20, compiled: bool = False
) -> dict[str, Any]:
    """Median time and spread of every candidate, speed-ups over the first, share of the floor.

    ``compiled`` adds torch.compile of the first candidate.
    """
    candidates = dict(work.candidates)
    first = next(iter(candidates))
    if compiled:
        candidates["torch.compile"] = torch.compile(candidates[first])
    if machine.device == "cuda":
        rows: dict[str, dict[str, Any]] = {
            name: {
                "us": microseconds(found.cold),
                "hot us": microseconds(found.hot),
                "spread": round(found.cold.spread, 3),
                "run": found.run,
                "peak bytes": found.peak_bytes,
            }
            for name, found in gpu_timer.compare_on_gpu(
                candidates, repetitions=repetitions, restore=work.restore
            ).items()
        }
    else:
        rows = {
            name: {"us": microseconds(found), "spread": round(found.spread, 3)}
            for name, found in timer.compare(
                candidates, repetitions=repetitions, before_each=work.restore
            ).items()
        }
    for row in rows.values():
        row["speed-up"] = round(rows[first]["us"] / row["us"], 2)
    seconds = rows["fused"]["us"] * 1e-6
    result: dict[str, Any] = {"candidates": rows, "bytes": work.bytes_moved}
    if work.bytes_moved:
        result["GB/s"] = round(work.bytes_moved / seconds / 1e9, 1)
        result["share of bandwidth"] = round(machine.seconds_to_move(work.bytes_moved) / seconds, 3)
    if work.flops:
        result["flops"] = work.flops
        result["GFLOP/s"] = round(work.flops / seconds / 1e9, 1)
        result["share of matrix rate"] = round(
            work.flops / seconds / machine.matrix_rate(work.dtype), 3
        )
    return result


def microseconds(timing: timer.Timing) -> float:
    return round(timing.median * 1e6, 2)
