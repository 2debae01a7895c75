"""Decoding rules beyond SPD: each is a function of `promote` with its options.

What a rule compares with tau_dec comes from `spd_generate(tau_dec=...)`, per row; the rest are the
rule's own options: `spd_generate(rule=Hierarchical(low_threshold=0.4))`. Rules without `revise`
keep a token once decoded, as models trained by plain masked diffusion need it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from dmax_kernels.decoding import promote
from dmax_kernels.decoding.composed import ComposedRule, DistributionRule, Top1Rule
from dmax_kernels.decoding.state import LiveBlocks
from dmax_kernels.reference.row_statistics import RowStatistics

if TYPE_CHECKING:
    from dmax_kernels.decoding.settings import Settings


@dataclass(frozen=True)
class Factor(Top1Rule):
    """Fast-dLLM's factor rule: see `promote.factor_promote`. No threshold."""

    factor: float = 1.0

    def __post_init__(self) -> None:
        require_number(self, "factor", self.factor, "positive", lambda value: value > 0)

    def promote(
        self, token: Tensor, confidence: Tensor, state: LiveBlocks, settings: Settings
    ) -> Tensor:
        return promote.factor_promote(confidence, state.masked, self.factor)


@dataclass(frozen=True)
class Hierarchical(Top1Rule):
    """dInfer's divide and conquer: see `promote.hierarchical_promote`."""

    low_threshold: float = 0.2

    def __post_init__(self) -> None:
        require_number(
            self, "low_threshold", self.low_threshold, "in [0, 1]", lambda value: 0 <= value <= 1
        )

    def promote(
        self, token: Tensor, confidence: Tensor, state: LiveBlocks, settings: Settings
    ) -> Tensor:
        return promote.hierarchical_promote(
            confidence, state.masked, state.tau_dec, self.low_threshold
        )


@dataclass(frozen=True)
class FixedCount(Top1Rule):
    """Rules that promote a fixed number of tokens per step. No threshold."""

    tokens_per_step: int = 1

    def __post_init__(self) -> None:
        require_count(self, "tokens_per_step", self.tokens_per_step)


@dataclass(frozen=True)
class TopN(FixedCount):
    """The most confident first: see `promote.top_n_promote`."""

    def promote(
        self, token: Tensor, confidence: Tensor, state: LiveBlocks, settings: Settings
    ) -> Tensor:
        return promote.top_n_promote(confidence, state.masked, self.tokens_per_step)


@dataclass(frozen=True)
class Autoregressive(FixedCount):
    """From left to right: see `promote.autoregressive_promote`."""

    def promote(
        self, token: Tensor, confidence: Tensor, state: LiveBlocks, settings: Settings
    ) -> Tensor:
        return promote.autoregressive_promote(confidence, state.masked, self.tokens_per_step)


@dataclass(frozen=True)
class Random(FixedCount):
    """In random order, the same for the same seed: see `promote.random_promote`."""

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            isinstance(self.seed, int) and 0 <= self.seed < 2**64,
            self,
            "seed",
            "an integer in [0, 2^64)",
            self.seed,
        )

    def promote(
        self, token: Tensor, confidence: Tensor, state: LiveBlocks, settings: Settings
    ) -> Tensor:
        return promote.random_promote(
            token, confidence, state.step, state.masked, self.tokens_per_step, self.seed
        )


@dataclass(frozen=True)
class EntropyBound(DistributionRule):
    """The most certain up to a sum of entropies: see `promote.entropy_bound_promote`."""

    entropy_bound: float = 0.1

    def __post_init__(self) -> None:
        require_number(
            self, "entropy_bound", self.entropy_bound, "at least 0", lambda value: value >= 0
        )

    def promote(self, statistics: RowStatistics, state: LiveBlocks, settings: Settings) -> Tensor:
        return promote.entropy_bound_promote(statistics.entropy, state.masked, self.entropy_bound)


@dataclass(frozen=True)
class Margin(DistributionRule):
    """A threshold on the lead over the runner-up: see `promote.margin_promote`."""

    def promote(self, statistics: RowStatistics, state: LiveBlocks, settings: Settings) -> Tensor:
        return promote.margin_promote(
            statistics.confidence, statistics.runner_up, state.masked, state.tau_dec
        )


@dataclass(frozen=True)
class Uniform(Top1Rule):
    """All at once, then revision until convergence: see `promote.uniform_promote`."""

    revise: bool = True

    def promote(
        self, token: Tensor, confidence: Tensor, state: LiveBlocks, settings: Settings
    ) -> Tensor:
        return promote.uniform_promote(confidence, state.masked)


@dataclass(frozen=True)
class ParallelForced(FixedCount):
    """Several slots of a block advance at every step: see `promote.parallel_forced_promote`.

    Here the slots are equal parts of each block. `nap.nap_generate` decodes the canvas of the
    paper, with headers and a summary.
    """

    num_slots: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count(self, "num_slots", self.num_slots)

    def promote(
        self, token: Tensor, confidence: Tensor, state: LiveBlocks, settings: Settings
    ) -> Tensor:
        return promote.parallel_forced_promote(
            confidence, state.masked, self.num_slots, self.tokens_per_step
        )


def require(condition: bool, rule: ComposedRule, option: str, need: str, got: object) -> None:
    if not condition:
        raise ValueError(f"{type(rule).__name__}: {option} must be {need}, got {got}")


def require_number(
    rule: ComposedRule, option: str, value: object, need: str, accepts: Callable[[float], bool]
) -> None:
    accepted = isinstance(value, (int, float)) and not isinstance(value, bool) and accepts(value)
    require(accepted, rule, option, f"a number, {need}", value)


def require_count(rule: ComposedRule, option: str, value: object) -> None:
    is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    require(is_count, rule, option, "a positive integer", value)
