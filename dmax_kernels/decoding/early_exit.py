"""Rules that decode a block step by step until it is sure, and then the rest of it at once."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dmax_kernels._checks import one_of, require
from dmax_kernels.decoding.rule_parts import FixedCount, best_of_groups, keep_number
from dmax_kernels.decoding.step import Seen


@dataclass(frozen=True)
class EarlyExit(FixedCount):
    """The `tokens_per_step` most confident positions, until the block is sure: then all at once.

    With E editable positions a block takes T = ceil(E / tokens_per_step) steps. In its t-th step it
    is sure when the mean of the gaps over the rule's region is at least bar(t / T). The gap is the
    top-1's logit minus the runner-up's, which is the logarithm of the ratio of their probabilities;
    one above 87 counts as about 87, the most that float32's probabilities can tell. It reads no
    tau_dec.
    """

    reads = "row_statistics"

    @abstractmethod
    def bar(self, progress: Tensor) -> Tensor:
        """The gap to be reached at t / T in (0, 1]."""

    @abstractmethod
    def region(self, seen: Seen) -> Tensor:
        """The positions whose gaps count, bool [..., K]."""

    def promote(self, seen: Seen) -> Tensor:
        tiny = torch.finfo(torch.float32).tiny
        gap = seen.confidence.log() - seen.runner_up.clamp(min=tiny).log()
        region, count = self.region(seen), seen.editable.sum(dim=-1)
        mean = gap.masked_fill(~region, 0).sum(dim=-1) / region.sum(dim=-1)
        steps = (count + self.tokens_per_step - 1) // self.tokens_per_step
        sure = mean >= self.bar((seen.step + 1).float() / steps)
        best = best_of_groups(seen.confidence, seen.masked, self.tokens_per_step)
        return torch.where(sure.unsqueeze(-1), seen.masked, best)


@dataclass(frozen=True)
class Prophet(EarlyExit):
    """The exit of Prophet: a bar in three stages (arXiv 2508.19982).

    `early` before 0.33 of the steps, `middle` before 0.67, then `late`. These numbers and the
    defaults are those of its code (pixeli99/Prophet at 460afe4, `should_early_exit`). Prophet
    averages over the answer's positions, decoded or not; a block does not know which of its
    positions hold an answer, and takes all editable ones.
    """

    early: float = 7.5
    middle: float = 5.0
    late: float = 2.5

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("early", "middle", "late"):
            keep_number(self, name, "not NaN", lambda value: not math.isnan(value))

    def region(self, seen: Seen) -> Tensor:
        return seen.editable

    def bar(self, progress: Tensor) -> Tensor:
        bar = torch.full_like(progress, self.late).masked_fill(progress < 0.67, self.middle)
        return bar.masked_fill(progress < 0.33, self.early)


@dataclass(frozen=True)
class SchED(EarlyExit):
    """The exit of SchED: a bar that falls smoothly with progress p (arXiv 2512.02892).

    linear: high + (low - high) p. cosine: low + (high - low) (1 + cos(pi p)) / 2. exponential:
    low + (high - low) exp(-rate p). The mean is over the positions that are still masked. Curves,
    mean and defaults are those of its code (amr-mohamedd/SchED at 7fa95a6, `sched.py`), whose
    README names `low` 0 and `rate` 2, 8 and 16 as further settings of the paper. Two differences:
    the code takes p = (t - 1) / (T - 1), and it leaves only if no prediction at a masked position
    has changed since the step before.
    """

    schedule: str = "cosine"
    high: float = 7.5
    low: float = 2.5
    rate: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.schedule in SCHEDULES, "SchED: schedule", one_of(SCHEDULES), self.schedule)
        for name in ("high", "low"):
            keep_number(self, name, "not NaN", lambda value: not math.isnan(value))
        keep_number(self, "rate", "positive", lambda value: value > 0)

    def region(self, seen: Seen) -> Tensor:
        return seen.masked

    def bar(self, progress: Tensor) -> Tensor:
        return self.low + (self.high - self.low) * SCHEDULES[self.schedule](self, progress)


# What is left of high - low at a progress
SCHEDULES: dict[str, Callable[[SchED, Tensor], Tensor]] = {
    "linear": lambda rule, progress: 1 - progress,
    "cosine": lambda rule, progress: (1 + torch.cos(math.pi * progress)) / 2,
    "exponential": lambda rule, progress: torch.exp(-rule.rate * progress),
}
