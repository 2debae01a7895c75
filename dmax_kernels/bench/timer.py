"""The one timer: a workload's candidates in one run, beside the floor measured in the same run.

On a CPU candidates take turns, so that a noisy machine is noisy for all of them alike. On a GPU
each is a replay of its captured graph, by events, with the L2 cache cold and hot.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from dmax_kernels.bench.workload import Work

Candidate = Callable[[], object]
FLUSH_BYTES = 512 << 20  # more than any L2


@dataclass
class Timing:
    """Seconds of every repetition of one candidate."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def microseconds(self) -> float:
        """The median, as results carry it."""
        return round(self.median * 1e6, 2)

    @property
    def spread(self) -> float:
        """Interquartile range over the median."""
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / self.median


def compare(
    candidates: dict[str, Candidate],
    *,
    repetitions: int = 20,
    at_most_seconds: float = 30.0,
    before_each: Candidate | None = None,
) -> dict[str, Timing]:
    """Time every candidate ``repetitions`` times, one after the other in each round, on a CPU.

    Each runs once untimed right before its timed run, so that it meets the caches as its own last
    run left them, not as another candidate did.

    ``before_each`` runs untimed ahead of every repetition (restores inputs that a candidate
    overwrites). Rounds end early, but not below 5, when ``at_most_seconds`` are over. The
    candidates must have finished when they return.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for candidate in candidates.values():  # warm-up: first calls allocate and compile
        if before_each:
            before_each()
        candidate()
    start = time.perf_counter()
    for round_index in range(repetitions):
        for name, candidate in candidates.items():
            for restore in (before_each, candidate, before_each):
                if restore:
                    restore()
            begin = time.perf_counter()
            candidate()
            times[name].append(time.perf_counter() - begin)
        if round_index >= 4 and time.perf_counter() - start > at_most_seconds:
            break
    return {name: Timing(seconds) for name, seconds in times.items()}


def captured(function: Candidate) -> tuple[Candidate, str]:
    """The function as a graph replay, or as it is where it cannot be captured (it syncs)."""
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                function()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
        return graph.replay, "graph"
    except RuntimeError:
        torch.cuda.synchronize()
        return function, "eager"


def timed(
    run: Candidate,
    repetitions: int,
    *,
    flush: torch.Tensor | None = None,
    restore: Candidate | None = None,
) -> Timing:
    """Each repetition by the GPU events around it; ``flush`` is overwritten before (a cold L2)."""
    seconds = []
    for _ in range(repetitions):
        if restore is not None:
            restore()
        if flush is not None:
            flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # keeps the GPU busy while the host queues both events, so that they bracket the work alone
        torch.cuda._sleep(200_000)
        start.record()
        run()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    return Timing(seconds)


def flush_buffer() -> torch.Tensor:
    return torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")


def peak_bytes(function: Candidate) -> int:
    """Bytes that one call allocates on the GPU at its highest, its results included."""
    function()  # first calls compile and keep buffers
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@dataclass
class Machine:
    """What the device at hand can do, measured once in this run."""

    device: str = "cpu"
    _matrix_rates: dict[torch.dtype, float] = field(default_factory=dict)

    @cached_property
    def copy_bandwidth(self) -> float:
        """Bytes per second of a copy of 2 GiB within the GPU, read and written."""
        source = torch.empty(1 << 30, dtype=torch.int16, device="cuda").random_()
        target = torch.empty_like(source)
        return 2 * source.nbytes / timed(lambda: target.copy_(source), 20).median

    def matrix_rate(self, dtype: torch.dtype) -> float:
        """FLOP per second of PyTorch's product of two large square matrices."""
        if dtype not in self._matrix_rates:
            size = 8192 if self.device == "cuda" else 2048
            a, b = (torch.randn(size, size, device=self.device, dtype=dtype) for _ in range(2))
            if self.device == "cuda":
                seconds = timed(lambda: a @ b, 20).median
            else:
                seconds = compare({"product": lambda: a @ b}, repetitions=5)["product"].median
            self._matrix_rates[dtype] = 2 * size**3 / seconds
        return self._matrix_rates[dtype]

    def seconds_to_move(self, nbytes: int) -> float:
        """The floor of work that moves so many bytes. On a CPU a read of as many by all threads,
        cached if the candidates' input is."""
        if self.device == "cuda":
            return nbytes / self.copy_bandwidth
        words = torch.ones(max(nbytes // 4, 1), dtype=torch.float32)
        return compare({"read": words.sum})["read"].median


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
    time_them = gpu_rows if machine.device == "cuda" else cpu_rows
    rows = time_them(candidates, repetitions, work.restore)
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


def cpu_rows(
    candidates: dict[str, Candidate], repetitions: int, restore: Candidate | None
) -> dict[str, dict[str, Any]]:
    times = compare(candidates, repetitions=repetitions, before_each=restore)
    return {
        name: {"us": found.microseconds, "spread": round(found.spread, 3)}
        for name, found in times.items()
    }


def gpu_rows(
    candidates: dict[str, Candidate], repetitions: int, restore: Candidate | None
) -> dict[str, dict[str, Any]]:
    """Cold and hot times, how each ran ("graph", or "eager" where it cannot be captured), and the
    bytes it allocated at its highest."""
    flush = flush_buffer()
    rows = {}
    for name, candidate in candidates.items():
        peak = peak_bytes(candidate)
        run, how = captured(candidate)
        cold = timed(run, repetitions, flush=flush, restore=restore)
        hot = timed(run, repetitions, restore=restore)
        rows[name] = {
            "us": cold.microseconds,
            "hot us": hot.microseconds,
            "spread": round(cold.spread, 3),
            "run": how,
            "peak bytes": peak,
        }
    return rows
