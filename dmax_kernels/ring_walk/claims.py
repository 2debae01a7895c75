"""The paper's claims about its tables, each with the test that decides it.

The claims, their tests and all margins were written down before the models of the ladder were
trained, and none was changed after its figures were seen. They name rows by method, so that the
same claims are judged after any number of training steps. Each is judged twice: by "answer" (the
last place is right, the analogue of the paper's accuracy) and by "strict" (so is every step).

A test has an interval of 95 %: of the difference of paired shares (`evaluation.metrics.paired`), or
between percentiles of 1,000 draws of the problems, the same in both rows. It holds or fails where
its interval says so, and is undecided otherwise. A claim holds if all of its tests do, and fails if
one of them does. The intervals are not corrected for the number of claims.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

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


@dataclass(frozen=True)
class Claim:
    """where: in the paper; "here" for what its tables leave out."""

    where: str
    text: str
    tests: tuple[Test, ...]

    def judge(self, outcomes: Outcomes, measure: str) -> tuple[str, list[Judged]]:
        judged = [test.judge(outcomes, measure) for test in self.tests]
        verdicts = {each.verdict for each in judged}
        if FAILS in verdicts:
            return FAILS, judged
        return (HOLDS if verdicts == {HOLDS} else UNDECIDED), judged


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


# The methods of Table 1, then what it leaves out
AREAS = (
    ("base", "threshold"),
    ("base", "hierarchical"),
    ("certainty", "threshold"),
    ("uniform", "uniform"),
    ("oput", "spd"),
    ("control", "threshold"),
    ("oput", "threshold"),
)

BASE = Cell("base", "threshold", 0.95)
DMAX = Cell("oput", "spd", 0.5)
HIERARCHICAL = Cell("base", "hierarchical", 0.95)
CERTAINTY = Cell("certainty", "threshold", 0.95)
UNIFORM = Cell("uniform", "uniform", 0.0)


def oput(rule: str, tau: float) -> Cell:
    return Cell("oput", rule, tau)


def base(rule: str, tau: float) -> Cell:
    return Cell("base", rule, tau)


CLAIMS = (
    Claim("Table 1", "DMax (tau 0.5) keeps the base model's accuracy", (Keeps(DMAX, BASE),)),
    Claim(
        "Table 1",
        "DMax decodes over twice the base's tokens per forward pass",
        (Faster(DMAX, BASE, 2.0),),
    ),
    Claim(
        "Table 1",
        "DMax decodes more tokens per forward pass than every baseline",
        tuple(Faster(DMAX, other) for other in (HIERARCHICAL, CERTAINTY, UNIFORM)),
    ),
    Claim(
        "Table 1",
        "DMax has the largest AUP of the five methods",
        tuple(LargerArea(("oput", "spd"), other) for other in AREAS[:4]),
    ),
    Claim(
        "Table 1",
        "Hierarchical decoding is faster than the plain threshold on the base model",
        (Faster(HIERARCHICAL, BASE),),
    ),
    Claim(
        "Table 1",
        "Certainty forcing is faster than the base and keeps its accuracy",
        (Faster(CERTAINTY, BASE), Keeps(CERTAINTY, BASE)),
    ),
    Claim(
        "Table 1",
        "Uniform diffusion training loses accuracy under its own decoding",
        (More(BASE, UNIFORM),),
    ),
    Claim(
        "Table 1",
        "Uniform diffusion training does not decode faster (less than 1.5 times the base)",
        (NotFaster(UNIFORM, BASE, 1.5),),
    ),
    Claim(
        "Table 2",
        "At low parallelism (tau 0.95) DMax is more accurate than the base",
        (More(oput("spd", 0.95), BASE),),
    ),
    Claim(
        "Table 2",
        "At low parallelism (tau 0.95) DMax is faster than the base",
        (Faster(oput("spd", 0.95), BASE),),
    ),
    Claim(
        "Table 3, row 1",
        "Aggressive thresholds (0.5, 0) break the base model",
        tuple(More(BASE, base("threshold", tau)) for tau in (0.5, 0.0)),
    ),
    Claim(
        "Table 3, row 2",
        "SPD collapses without OPUT, at every threshold",
        tuple(Collapses(base("spd", tau), BASE) for tau in (0.95, 0.5, 0.0)),
    ),
    Claim(
        "Table 3, row 3",
        "OPUT alone, with hard tokens, beats the base at the same threshold (0.5, 0)",
        tuple(More(oput("hard", tau), base("threshold", tau)) for tau in (0.5, 0.0)),
    ),
    Claim(
        "Table 3, row 4",
        "A contiguous prefix improves hard tokens at 0.5",
        (More(oput("hard_prefix", 0.5), oput("hard", 0.5)),),
    ),
    Claim(
        "Table 3, row 5",
        "Hybrid embeddings improve on hard tokens at 0.5",
        (More(oput("hybrid", 0.5), oput("hard", 0.5)),),
    ),
    Claim(
        "Table 3, row 5",
        "Hybrid embeddings improve on hard tokens at 0",
        (More(oput("hybrid", 0.0), oput("hard", 0.0)),),
    ),
    Claim(
        "Table 3, row 6",
        "A contiguous prefix improves hybrid embeddings at 0.5",
        (More(DMAX, oput("hybrid", 0.5)),),
    ),
    Claim(
        "Table 3, row 6",
        "SPD at 0 stays within 5 points of SPD at 0.95",
        (Keeps(oput("spd", 0.0), oput("spd", 0.95), margin=5.0),),
    ),
    Claim(
        "Table 4",
        "The convergence criterion does not change the accuracy",
        tuple(
            test
            for criterion in ("consistency", "confidence")
            for other in (Cell("oput", "spd", 0.5, criterion),)
            for test in (Keeps(DMAX, other), Keeps(other, DMAX))
        ),
    ),
    Claim(
        "Table 4",
        "Consistency alone needs fewer passes than confidence alone, and both together the fewest",
        (
            Faster(Cell("oput", "spd", 0.5, "consistency"), Cell("oput", "spd", 0.5, "confidence")),
            Faster(DMAX, Cell("oput", "spd", 0.5, "consistency")),
        ),
    ),
    Claim(
        "Figure 4",
        "DMax loses less than the base as the threshold falls (0.5, 0)",
        tuple(More(oput("spd", tau), base("threshold", tau)) for tau in (0.5, 0.0)),
    ),
    Claim(
        "here",
        "DMax has a larger AUP than the control: masked training on the same responses",
        (LargerArea(("oput", "spd"), ("control", "threshold")),),
    ),
    Claim(
        "here",
        "SPD has a larger AUP than a plain threshold on the same OPUT model",
        (LargerArea(("oput", "spd"), ("oput", "threshold")),),
    ),
    Claim(
        "here",
        "OPUT makes revision work: hard tokens beat no revision on the same model (0.5, 0)",
        tuple(More(oput("hard", tau), oput("threshold", tau)) for tau in (0.5, 0.0)),
    ),
    Claim(
        "here",
        "SPD collapses on the control too, at every threshold",
        tuple(Collapses(Cell("control", "spd", tau), BASE) for tau in (0.95, 0.5, 0.0)),
    ),
)


def judge_all(outcomes: Outcomes, measure: str) -> list[tuple[Claim, str, list[Judged]]]:
    return [(claim, *claim.judge(outcomes, measure)) for claim in CLAIMS]


def as_json(outcomes: Outcomes, measure: str) -> list[dict[str, Any]]:
    return [
        {
            "where": claim.where,
            "claim": claim.text,
            "verdict": verdict,
            "tests": [vars(each) for each in judged],
        }
        for claim, verdict, judged in judge_all(outcomes, measure)
    ]
