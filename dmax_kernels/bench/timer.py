"""The one timer: a workload's candidates in one run, beside the floor measured in the same run.

Candidates take turns, so that a noisy machine is noisy for all of them alike. How a GPU is timed is
in gpu_timer.py.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from dmax_kernels.bench.workload import OURS, Work

Candidate = Callable[[], object]
# A longer call replaces what the previous candidate left in the caches by itself
SETTLED_SECONDS = 0.02
FEWEST_ROUNDS = 3
COMPILE_MODES = {"torch.compile": "default", "torch.compile, tuned": "max-autotune-no-cudagraphs"}


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

    def row(self) -> dict[str, Any]:
        return {
            "us": self.microseconds,
            "least us": round(min(self.seconds) * 1e6, 2),
            "spread": round(self.spread, 3),
        }


def warm_up(
    candidates: dict[str, Candidate],
    before_each: Candidate | None = None,
    failed: dict[str, str] | None = None,
) -> dict[str, float]:
    """Seconds of a first call of each, which may compile, and of a second where that was short.

    A candidate that raises is named in `failed` with its reason, and is absent from the result.
    """
    seconds = {}
    for name, candidate in candidates.items():
        try:
            for _ in range(2):
                if before_each:
                    before_each()
                begin = time.perf_counter()
                candidate()
                seconds[name] = time.perf_counter() - begin
                if seconds[name] > 1 and "torch.compile" not in name:
                    break
        except Exception as error:
            if failed is None or name == "fused":
                raise
            seconds.pop(name, None)
            failed[name] = f"failed: {type(error).__name__}: {error}".splitlines()[0]
    return seconds


def compare(
    candidates: dict[str, Candidate],
    *,
    repetitions: int = 20,
    at_most_seconds: float = 30.0,
    before_each: Candidate | None = None,
    failed: dict[str, str] | None = None,
) -> dict[str, Timing]:
    """Time every candidate ``repetitions`` times, one after the other in each round, on a CPU.

    A short one runs once untimed right before its timed run, so that it finds the caches as its own
    last run left them, not as a different candidate did.

    ``before_each`` runs untimed ahead of every repetition (restores inputs that a candidate
    overwrites). Rounds end early, but not below 3, when ``at_most_seconds`` are over. The
    candidates must have finished when they return.
    """
    first_calls = warm_up(candidates, before_each, failed)
    times: dict[str, list[float]] = {name: [] for name in first_calls}
    start = time.perf_counter()
    for round_index in range(repetitions):
        for name in times:
            candidate = candidates[name]
            settle = candidate if first_calls[name] < SETTLED_SECONDS else None
            for untimed in (before_each, settle, before_each if settle else None):
                if untimed:
                    untimed()
            begin = time.perf_counter()
            candidate()
            times[name].append(time.perf_counter() - begin)
        if round_index + 1 >= FEWEST_ROUNDS and time.perf_counter() - start > at_most_seconds:
            break
    return {name: Timing(seconds) for name, seconds in times.items()}


@dataclass
class Machine:
    """What the device at hand can do, measured once in this run."""

    device: str = "cpu"
    gpu: Any = None  # gpu_timer.Gpu, or a stand-in that runs on a CPU
    _matrix_rates: dict[torch.dtype, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.device == "cuda":
            from dmax_kernels.bench.gpu_timer import Gpu

            self.gpu = Gpu()

    @cached_property
    def copy_bandwidth(self) -> float:
        """Bytes per second of a copy within the GPU, reads and writes both counted."""
        source = self.gpu.large_buffer()
        target = torch.empty_like(source)
        return 2 * source.nbytes / self.gpu.median(lambda: target.copy_(source))

    @cached_property
    def read_bandwidth(self) -> float:
        """Bytes per second of a sum on the GPU, which writes nothing."""
        source = self.gpu.large_buffer()
        return source.nbytes / self.gpu.median(source.sum)

    def matrix_rate(self, dtype: torch.dtype) -> float:
        """FLOP per second of PyTorch's product of two large square matrices."""
        if dtype not in self._matrix_rates:
            size = self.gpu.matrix_size if self.gpu else 2048
            a, b = (torch.randn(size, size, device=self.device, dtype=dtype) for _ in range(2))
            if self.gpu:
                seconds = self.gpu.median(lambda: a @ b)
            else:
                seconds = compare({"product": lambda: a @ b}, repetitions=5)["product"].median
            self._matrix_rates[dtype] = 2 * size**3 / seconds
        return self._matrix_rates[dtype]

    def seconds_to_move(self, work: Work) -> float:
        """The floor of work that moves this many bytes. On a CPU it is a read of as many bytes by
        all threads, cached if the candidates' input is."""
        if self.gpu:
            return work.bytes_moved / (self.copy_bandwidth if work.writes else self.read_bandwidth)
        words = torch.ones(max(work.bytes_moved // 4, 1), dtype=torch.float32)
        return compare({"read": words.sum}, at_most_seconds=0.5)["read"].median


def measure(
    make: Callable[[], Work],
    machine: Machine,
    *,
    repetitions: int = 20,
    compiled: Sequence[str] = (),
    at_most_seconds: float = 30.0,
) -> dict[str, Any]:
    """Median, least time and spread of every candidate; speed-up over eager, ratio to the best
    peer, share of the floor.

    ``make`` returns the same work on new tensors at each call, because a GPU's timer cycles through
    several sets. ``compiled`` names the modes of COMPILE_MODES in which the first candidate also
    runs compiled.
    """
    torch._dynamo.reset()  # else a second shape would be compiled with dynamic sizes

    def make_with_compiled() -> Work:
        work = make()
        first = next(iter(work.candidates.values()))
        for name in compiled:
            work.candidates[name] = torch.compile(first, dynamic=False, mode=COMPILE_MODES[name])
        return work

    failed: dict[str, str] = {}
    extra: dict[str, Any] = {}
    if machine.gpu:
        from dmax_kernels.bench.gpu_timer import gpu_rows

        work, rows, extra = gpu_rows(
            make_with_compiled, machine.gpu, repetitions, at_most_seconds, failed
        )
    else:
        work = make_with_compiled()
        times = compare(
            work.candidates,
            repetitions=repetitions,
            at_most_seconds=at_most_seconds,
            before_each=work.restore,
            failed=failed,
        )
        rows = {name: timing.row() for name, timing in times.items()}
    result = {"candidates": rows, "bytes": work.bytes_moved, **ratios(rows), **extra}
    if failed:
        result["without a time"] = failed
    seconds = rows["fused"]["us"] * 1e-6
    if work.bytes_moved:
        result["GB/s"] = round(work.bytes_moved / seconds / 1e9, 1)
        result["share of bandwidth"] = round(machine.seconds_to_move(work) / seconds, 3)
    if work.flops:
        result["flops"] = work.flops
        result["GFLOP/s"] = round(work.flops / seconds / 1e9, 1)
        result["share of matrix rate"] = round(
            work.flops / seconds / machine.matrix_rate(work.dtype), 3
        )
    return result


def ratios(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Puts every candidate's speed-up over eager into its row; ours against the best of the peers,
    by the medians and by the least times, each against the peer that is best by that measure."""
    eager, fused = rows.get("eager"), rows["fused"]
    if eager:
        for row in rows.values():
            row["speed-up"] = round(eager["us"] / row["us"], 2)
    peers = {name: row for name, row in rows.items() if name not in OURS}
    if not peers:
        return {}
    best = min(peers, key=lambda name: peers[name]["us"])
    least = min(row["least us"] for row in peers.values())
    return {
        "best peer": best,
        "to best peer": round(peers[best]["us"] / fused["us"], 2),
        "to best peer, least times": round(least / fused["least us"], 2),
    }
