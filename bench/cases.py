"""What a benchmark file lists: the cases of an op that are kept, with what they must reach.

Every bench/bench_<op>.py has ``CASES`` (CPU) and may have ``GPU_CASES``, and a pytest-benchmark
test of the former. ``pytest bench --benchmark-only`` times each candidate alone;
``python bench/run.py`` (``make bench``) times the candidates of a case in turn, in one run, and
writes the ratios: those are the figures to quote.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from dmax_kernels.bench.workload import DTYPES, WORKLOADS, Inputs, Work

CANDIDATES = ("eager", "fused")  # in every workload, whatever else it has


@dataclass(frozen=True)
class Case:
    """A workload at one shape. The targets are those of the design."""

    workload: str
    sizes: tuple[int, ...]
    dtype: str = "bfloat16"
    values: str = "flat"
    speedup_target: float | None = None  # over eager, on a CPU
    bandwidth_target: float | None = None  # share of what is measured beside it
    target_us: float | None = None  # on an H200
    # Written before any run: bytes over 4.3 TB/s, the copy bandwidth expected of an H200, plus 2 us
    # of launch, plus 2 us where a second phase follows the stream
    predicted_us: float | None = None
    compiled: bool = False  # torch.compile is a candidate, too

    @property
    def all_sizes(self) -> tuple[int, ...]:
        return WORKLOADS[self.workload].all_sizes(self.sizes)

    @property
    def name(self) -> str:
        shape = " x ".join(map(str, self.all_sizes))
        return f"{self.workload} {shape} {self.dtype} {self.values}"

    def inputs(self, device: str = "cpu") -> Inputs:
        return Inputs(DTYPES[self.dtype], device, self.values)

    def work(self, device: str = "cpu") -> Work:
        return WORKLOADS[self.workload].work(self.inputs(device), self.sizes)


def benchmark_of(cases: list[Case]):
    """The pytest-benchmark test of a file's cases."""
    parameters = [
        pytest.param(case, candidate, id=f"{case.name}-{candidate}")
        for case in cases
        for candidate in CANDIDATES
    ]

    @pytest.mark.parametrize(("case", "candidate"), parameters)
    def test_benchmark(benchmark, case, candidate):
        work = case.work()
        benchmark.group = case.name

        def setup():
            if work.restore:
                work.restore()

        benchmark.pedantic(work.candidates[candidate], setup=setup, rounds=10, warmup_rounds=1)

    return test_benchmark
