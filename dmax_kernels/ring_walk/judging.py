"""Tests of claims about rows of an evaluation, each with an interval of 95 %.

The intervals are of differences of paired shares (`evaluation.metrics.paired`), or between
percentiles over 1,000 draws of the problems, the same in both rows. A test holds or fails where its
interval says so, and is undecided otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from dmax_kernels.evaluation.cells import Cell, Outcome
from dmax_kernels.evaluation.metrics import aup, paired

HOLDS, FAILS, UNDECIDED = "holds", "fails", "undecided"
NOTHING = 1.0  # points: an improvement that is surely smaller counts as none
KEPT = 2.0  # points that a row may lose and still count as keeping its accuracy
COLLAPSED = 0.5  # a row collapses if it has less than this share of the other's right answers
DRAWS = 1000
Outcomes = Mapping[Cell, Outcome]


@dataclass(frozen=True)
class Judged:
    """A test's figure with its interval, and what follows: points, a ratio or an AUP."""

    verdict: str
    value: float
    low: float
    high: float
    unit: str

    def __str__(self) -> str:
        sign, digits = {"points": ("+", 1), "x": ("", 2), "AUP": ("+", 0)}[self.unit]
        value, low, high = (f"{v:{sign}.{digits}f}" for v in (self.value, self.low, self.high))
        return f"{value} [{low}, {high}] {self.unit}"


def above(low: float, high: float, holds: float, fails: float) -> str:
    return HOLDS if low > holds else FAILS if high < fails else UNDECIDED


@dataclass(frozen=True)
class More:
    """`first` is right more often than `second`."""

    first: Cell
    second: Cell

    def judge(self, outcomes: Outcomes, measure: str) -> Judged:
        value, low, high = points(outcomes, self.first, self.second, measure)
        return Judged(above(low, high, 0, NOTHING), value, low, high, "points")


@dataclass(frozen=True)
class Keeps:
    """`first` is right at most `margin` points less often than `second`."""

    first: Cell
    second: Cell
    margin: float = KEPT

    def judge(self, outcomes: Outcomes, measure: str) -> Judged:
        value, low, high = points(outcomes, self.first, self.second, measure)
        return Judged(above(low, high, -self.margin, -self.margin), value, low, high, "points")


@dataclass(frozen=True)
class Collapses:
    """`first` is right less than half as often as `second`."""

    first: Cell
    second: Cell

    def judge(self, outcomes: Outcomes, measure: str) -> Judged:
        n = min(outcomes[cell].problems for cell in (self.first, self.second))
        one, other = (
            np.array(outcomes[cell].right[measure][:n], float) for cell in (self.first, self.second)
        )
        value, low, high = ratio_interval(one, other)
        verdict = HOLDS if high < COLLAPSED else FAILS if low > COLLAPSED else UNDECIDED
        return Judged(verdict, value, low, high, "x")


@dataclass(frozen=True)
class Faster:
    """`first` decodes more than `factor` times as many tokens per forward pass as `second`."""

    first: Cell
    second: Cell
    factor: float = 1.0

    def judge(self, outcomes: Outcomes, measure: str) -> Judged:
        n = min(outcomes[cell].problems for cell in (self.first, self.second))
        one, other = (rates(outcomes[cell])[:n] for cell in (self.first, self.second))
        value, low, high = ratio_interval(one, other)
        return Judged(above(low, high, self.factor, self.factor), value, low, high, "x")


@dataclass(frozen=True)
class NotFaster(Faster):
    """`first` does not: `factor` is the most that counts as no gain."""

    def judge(self, outcomes: Outcomes, measure: str) -> Judged:
        found = super().judge(outcomes, measure)
        turned = {HOLDS: FAILS, FAILS: HOLDS, UNDECIDED: UNDECIDED}[found.verdict]
        return Judged(turned, found.value, found.low, found.high, found.unit)


@dataclass(frozen=True)
class LargerArea:
    """(model, rule) `first` has the larger AUP, over its thresholds, than `second`."""

    first: tuple[str, str]
    second: tuple[str, str]

    def judge(self, outcomes: Outcomes, measure: str) -> Judged:
        areas = drawn_areas(outcomes, measure)
        value = areas[self.first][0] - areas[self.second][0]
        low, high = np.percentile(areas[self.first][1:] - areas[self.second][1:], (2.5, 97.5))
        return Judged(above(low, high, 0, 0), float(value), float(low), float(high), "AUP")


Test = More | Keeps | Collapses | Faster | LargerArea


# The methods of Table 1, then what it leaves out
AREAS = (
    ("base", "threshold"),
    ("base", "hierarchical"),
    ("certainty", "threshold"),
    ("uniform", "uniform"),
    ("oput", "spd"),
    ("control", "threshold"),
    ("oput", "threshold"),
    ("uniform", "spd"),
)


def points(
    outcomes: Outcomes, first: Cell, second: Cell, measure: str
) -> tuple[float, float, float]:
    """The first less the second with its interval, in points."""
    change = paired(outcomes[first].right[measure], outcomes[second].right[measure])
    return 100 * change.difference, 100 * change.low, 100 * change.high


def rates(outcome: Outcome) -> np.ndarray:
    """Tokens per forward pass of each problem, without the end of sequence: the authors' TPF."""
    tokens = np.array(outcome.tokens) - np.array(outcome.complete)
    return tokens / np.array(outcome.forwards)


@lru_cache(maxsize=4)
def problem_draws(n: int) -> np.ndarray:
    """[DRAWS + 1, n]: how often each problem is drawn; row 0 is the sample itself."""
    drawn = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), DRAWS)
    return np.concatenate([np.ones((1, n), drawn.dtype), drawn]).astype(float) / n


def ratio_interval(one: np.ndarray, other: np.ndarray) -> tuple[float, float, float]:
    """The ratio of the means, with its interval."""
    draws = problem_draws(len(one))
    ratio = (draws @ one) / np.maximum(draws @ other, 1e-9)
    low, high = np.percentile(ratio[1:], (2.5, 97.5))
    return float(ratio[0]), float(low), float(high)


def drawn_areas(outcomes: Outcomes, measure: str) -> dict[tuple[str, str], np.ndarray]:
    """The AUP of each series of `AREAS` that is there, of the sample and of each draw.

    y_max is the best accuracy of all of their points, as in `evaluation.report`.
    """
    series = {
        key: [cell for cell in outcomes if (cell.model, cell.rule) == key and is_plain(cell)]
        for key in AREAS
    }
    series = {key: cells for key, cells in series.items() if cells}
    cells = [cell for each in series.values() for cell in each]
    n = min(outcomes[cell].problems for cell in cells)
    draws = problem_draws(n)
    share = {c: 100 * draws @ np.array(outcomes[c].right[measure][:n], float) for c in cells}
    speed = {c: draws @ rates(outcomes[c])[:n] for c in cells}
    best = np.clip(np.max([share[cell] for cell in cells], axis=0), 0, 100)

    def areas(cells: Sequence[Cell]) -> np.ndarray:
        x = np.stack([speed[cell] for cell in cells], 1)
        y = np.clip(np.stack([share[cell] for cell in cells], 1), 0, 100)
        return np.array([aup(*row) for row in zip(x, y, best, strict=True)])

    return {key: areas(cells) for key, cells in series.items()}


def is_plain(cell: Cell) -> bool:
    return cell.convergence == "both"
