"""A stand-in for a GPU, so that every stage of a session can run without one (--dry-run).

The calls run on the CPU, at once; sizes are cut down, and the times mean nothing.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Sequence

import torch

from bench.cases import Case
from dmax_kernels.bench.timer import Candidate

MOST = 64  # of any size
FACTS = {"device": "no GPU", "compute capability": "9.0"}


class FakeGpu:
    """What gpu_timer.Gpu does, as far as the timer calls it."""

    matrix_size = 64

    def large_buffer(self) -> torch.Tensor:
        return torch.ones(1024)

    def flush(self) -> None: ...

    def empty(self) -> None: ...

    def synchronize(self) -> None: ...

    def release(self) -> None: ...

    def has_room(self) -> bool:
        return True

    def seconds(self, run: Candidate) -> float:
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin

    def median(self, run: Candidate, repetitions: int = 3) -> float:
        return statistics.median(self.seconds(run) for _ in range(repetitions))

    def captured(self, calls: Sequence[Candidate]) -> tuple[Candidate, str]:
        return lambda: [call() for call in calls], "graph"

    def peak_bytes(self, call: Candidate) -> int:
        call()
        return 0

    def clocks(self) -> str:
        return "unknown"


def small(case: Case) -> Case:
    return dataclasses.replace(case, sizes=tuple(min(size, MOST) for size in case.all_sizes))
