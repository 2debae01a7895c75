"""What a benchmark file lists: cases, each with candidates that do the same work.

Every bench/bench_<op>.py has ``CASES`` and a pytest-benchmark test made of them.
``pytest bench --benchmark-only`` times each candidate alone; ``python bench/run.py`` times the
candidates of a case in turn, in one run, and writes the ratios: those are the figures to quote.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch

VOCAB = 157184  # LLaDA-2.0-mini's vocabulary, hidden size, mask token
DIM = 2048
MASK = 156895


@dataclass
class Work:
    """The inputs of a case, made when it runs, and what is timed on them."""

    candidates: dict[str, Callable[[], object]]
    before_each: Callable[[], object] | None = None  # untimed: restores what a candidate overwrites
    read: torch.Tensor | None = None  # what has to be read once: the floor of the case


@dataclass
class Case:
    """One op at one shape. ``candidates`` do the same work; "fused" is ours."""

    name: str
    build: Callable[[], Work]
    candidates: tuple[str, ...] = ("eager", "fused")
    target: float | None = None  # the speed-up over the first candidate that the design asks for
    bandwidth_target: float | None = None  # share of the read bandwidth measured beside it
    facts: dict[str, object] = field(default_factory=dict)


def peaked_logits(rows: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows of a model that is sure: one logit stands far out of normal noise."""
    generator = torch.manual_seed(0)
    logits = torch.randn(rows, VOCAB, generator=generator)
    logits[torch.arange(rows), torch.randint(0, VOCAB, (rows,), generator=generator)] = 60.0
    return logits.to(dtype)


def flat_logits(rows: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows of a model that is not: every exponential counts."""
    return (3 * torch.randn(rows, VOCAB, generator=torch.manual_seed(0))).to(dtype)


LOGITS = {"peaked": peaked_logits, "flat": flat_logits}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def benchmark_of(cases: list[Case]):
    """The pytest-benchmark test of a file's cases."""
    parameters = [
        pytest.param(case, candidate, id=f"{case.name}-{candidate}")
        for case in cases
        for candidate in case.candidates
    ]

    @pytest.mark.parametrize(("case", "candidate"), parameters)
    def test_benchmark(benchmark, case, candidate):
        work = case.build()
        assert set(work.candidates) == set(case.candidates)
        benchmark.group = case.name

        def setup():
            if work.before_each:
                work.before_each()

        benchmark.pedantic(work.candidates[candidate], setup=setup, rounds=10, warmup_rounds=1)

    return test_benchmark
