"""The one timer: candidates in turn, so that a noisy machine is noisy for all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass
class Timing:
    """Seconds of every repetition of one candidate."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def best(self) -> float:
        return min(self.seconds)

    @property
    def spread(self) -> float:
        """Interquartile range over the median."""
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / self.median


def compare(
    candidates: dict[str, Callable[[], object]],
    *,
    repetitions: int = 20,
    at_most_seconds: float = 30.0,
    before_each: Callable[[], object] | None = None,
) -> dict[str, Timing]:
    """Time every candidate ``repetitions`` times, one after the other in each round.

    Each runs once untimed right before its timed run, so that it meets the caches as its own last
    run left them, not as another candidate did.

    ``before_each`` runs untimed ahead of every repetition (restores inputs that a candidate
    overwrites). Rounds end early, but not below 5, when ``at_most_seconds`` are over. CPU only:
    the candidates must have finished when they return.
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


def read_seconds(nbytes: int, repetitions: int = 20) -> float:
    """Median time of reading so many bytes once with all threads: the floor of what reads them."""
    words = torch.ones(max(nbytes // 4, 1), dtype=torch.float32)
    return compare({"read": words.sum}, repetitions=repetitions)["read"].median


def multiply_rate(dtype: torch.dtype, size: int = 2048) -> float:
    """FLOP per second of PyTorch's product of two square matrices."""
    a, b = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    return 2 * size**3 / compare({"product": lambda: a @ b}, repetitions=5)["product"].median
