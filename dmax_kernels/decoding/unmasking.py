"""Decoding rules beyond SPD: each is a function of `promote` with its options.

What a rule compares with tau_dec comes from `spd_generate(tau_dec=...)`, per row; the rest are the
rule's own options: `spd_generate(rule=Hierarchical(low_threshold=0.4))`. Rules without `revise`
keep a token once decoded, as models trained by plain masked diffusion need it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from dmax_kernels._numbers import as_integer, as_number, shown
from dmax_kernels.decoding import promote
from dmax_kernels.decoding.composed import ComposedRule, DistributionRule, Top1Rule
from dmax_kernels.decoding.state import LiveBlocks
from dmax_kernels.reference.statistics import RowStatistics

if TYPE_CHECKING:
    from dmax_kernels.decoding.settings import Settings


@dataclass(frozen=True)
class Factor(Top1Rule):
    """Fast-dLLM's factor rule: see `promote.factor_promote`. No threshold."""

    factor: float = 1.0

    def __post_init__(self) -> None:
        set_number(self, "factor", "positive", lambda value: value > 0)

    def promote(
        self, token: Tensor, confidence: Tensor, state: LiveBlocks, settings: Settings
    ) -> Tensor:
        return promote.factor_promote(confidence, state.masked, self.factor)


@dataclass(frozen=True)
class Hierarchical(Top1Rule):
    """dInfer's divide and conquer: see `promote.hierarchical_promote`."""

    low_threshold: float = 0.2

    def __post_init__(self) -> None:
        set_number(self, "low_threshold", "in [0, 1]", lambda value: 0 <= value <= 1)

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
        set_count(self, "tokens_per_step")


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
        set_integer(self, "seed", "an integer in [0, 2^64)", lambda value: 0 <= value < 2**64)

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
        set_number(self, "entropy_bound", "at least 0", lambda value: value >= 0)

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
        set_count(self, "num_slots")

    def promote(
        self, token: Tensor, confidence: Tensor, state: LiveBlocks, settings: Settings
    ) -> Tensor:
        return promote.parallel_forced_promote(
            confidence, state.masked, self.num_slots, self.tokens_per_step
        )


def set_number(
    rule: ComposedRule, option: str, need: str, accepts: Callable[[float], bool]
) -> None:
    """Check an option that is a number, and keep it as a Python float."""
    set_option(rule, option, f"a number, {need}", as_number(getattr(rule, option)), accepts)


def set_integer(rule: ComposedRule, option: str, need: str, accepts: Callable[[int], bool]) -> None:
    """Check an option that is an integer, and keep it as a Python int."""
    set_option(rule, option, need, as_integer(getattr(rule, option)), accepts)


def set_count(rule: ComposedRule, option: str) -> None:
    set_integer(rule, option, "a positive integer", lambda value: value >= 1)


def set_option(
    rule: ComposedRule, option: str, need: str, value: Any, accepts: Callable[[Any], bool]
) -> None:
    if value is None or not accepts(value):
        got = shown(getattr(rule, option))
        raise ValueError(f"{type(rule).__name__}: {option} must be {need}, got {got}")
    object.__setattr__(rule, option, value)  # the rules are frozen
