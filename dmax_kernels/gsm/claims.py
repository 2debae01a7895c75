"""The paper's claims as tests of measured rows; they were written before the first model was there.

Each claim is a difference between two cells on the same problems, in points of `answer`, or between
two methods' AUP. It holds where the whole interval of 95 % lies above the claim's margin, fails
where the whole interval lies below it, and is undecided otherwise. Where a row is missing the claim
has not been run. No correction for the number of claims is made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from dmax_kernels.evaluation.cells import Cell, Outcome
from dmax_kernels.evaluation.metrics import aup, paired
from dmax_kernels.gsm.stages import CELLS
from dmax_kernels.ring_walk.judging import above, rates

MEASURE = "answer"  # the paper's accuracy
RESAMPLES = 2000  # of the problems, for the interval of an AUP


@dataclass(frozen=True)
class Claim:
    """`first` less `second` in points, against `margin`."""

    where: str
    text: str
    first: Cell
    second: Cell
    margin: float = 0.0


@dataclass(frozen=True)
class AupClaim:
    """The AUP of one (model, rule) over its thresholds less that of another, against 0."""

    where: str
    text: str
    first: tuple[str, str]
    second: tuple[str, str]


@dataclass(frozen=True)
class Verdict:
    claim: Claim | AupClaim
    verdict: str  # "holds", "fails", "undecided" or "not run"
    figures: str = ""


BASE = Cell("base", "threshold", 0.95)
DMAX = Cell("oput", "spd", 0.5)
CLAIMS = (
    Claim(
        "Table 1",
        "DMax (OPUT and SPD at tau_dec 0.5) keeps the base's accuracy at 0.95 (within 3 points)",
        DMAX,
        BASE,
        margin=-3.0,
    ),
    Claim(
        "Table 1",
        "Uniform training is less accurate than DMax",
        DMAX,
        Cell("uniform", "uniform", 0.0),
    ),
    Claim(
        "Table 2",
        "OPUT and SPD at 0.95 are more accurate than the base at 0.95",
        Cell("oput", "spd", 0.95),
        BASE,
    ),
    Claim(
        "Table 3",
        "An aggressive threshold (0.5) breaks the base",
        BASE,
        Cell("base", "threshold", 0.5),
    ),
    Claim(
        "Table 3",
        "SPD without OPUT collapses (loses more than 20 points)",
        BASE,
        Cell("base", "spd", 0.5),
        margin=20.0,
    ),
    Claim(
        "Table 3",
        "OPUT alone, with revised hard tokens, repairs 0.5",
        Cell("oput", "hard", 0.5),
        Cell("base", "threshold", 0.5),
    ),
    Claim(
        "Table 3",
        "Hybrid embeddings beat hard tokens when everything is decoded at once (0)",
        Cell("oput", "hybrid", 0.0),
        Cell("oput", "hard", 0.0),
    ),
    Claim(
        "Table 3",
        "A contiguous prefix helps SPD at 0.5",
        DMAX,
        Cell("oput", "hybrid", 0.5),
    ),
    AupClaim("Table 1", "DMax has more AUP than the base", ("oput", "spd"), ("base", "threshold")),
    AupClaim(
        "Table 1",
        "DMax has more AUP than certainty forcing (dParallel)",
        ("oput", "spd"),
        ("certainty", "threshold"),
    ),
    AupClaim(
        "beside Table 1",
        "DMax has more AUP than plain masked diffusion on the same distilled data (control)",
        ("oput", "spd"),
        ("control", "threshold"),
    ),
)


def verdicts(rows: Mapping[Cell, Outcome]) -> list[Verdict]:
    return [
        judge_aup(claim, rows) if isinstance(claim, AupClaim) else judge(claim, rows)
        for claim in CLAIMS
    ]


def judge(claim: Claim, rows: Mapping[Cell, Outcome]) -> Verdict:
    if claim.first not in rows or claim.second not in rows:
        return Verdict(claim, "not run")
    first, second = rows[claim.first], rows[claim.second]
    found = paired(first.right[MEASURE], second.right[MEASURE])
    passes = " against ".join(f"{each.tokens_per_forward():.2f}" for each in (first, second))
    figures = (
        f"{100 * found.difference:+.1f} points "
        f"[{100 * found.low:+.1f}, {100 * found.high:+.1f}], p {found.p_value:.1g}, "
        f"n {found.problems}; {passes} tokens per forward"
    )
    verdict = above(100 * found.low, 100 * found.high, claim.margin, claim.margin)
    return Verdict(claim, verdict, figures)


def judge_aup(claim: AupClaim, rows: Mapping[Cell, Outcome]) -> Verdict:
    cells = [method_cells(*method) for method in (claim.first, claim.second)]
    if not all(cell in rows for group in cells for cell in group):
        return Verdict(claim, "not run")
    series = [[rows[cell] for cell in group] for group in cells]
    problems = min(each.problems for group in series for each in group)
    best = max(100 * outcome.share(MEASURE) for outcome in rows.values())
    rng = np.random.default_rng(0)
    draws = rng.integers(problems, size=(RESAMPLES, problems))
    one, other = (np.array([method_aup(group, draw, best) for draw in draws]) for group in series)
    whole = np.arange(problems)
    first, second = (method_aup(group, whole, best) for group in series)
    low, high = np.quantile(one - other, (0.025, 0.975))
    figures = (
        f"AUP {first:.0f} against {second:.0f}, difference [{low:+.0f}, {high:+.0f}] "
        f"(bootstrap over {problems} problems)"
    )
    return Verdict(claim, above(low, high, 0.0, 0.0), figures)


def method_cells(model: str, rule: str) -> list[Cell]:
    return [Cell(model, name, tau) for name, tau in CELLS[model] if name == rule]


def method_aup(outcomes: list[Outcome], chosen: np.ndarray, best: float) -> float:
    """AUP over these problems; `best` is y_max, over all rows and all problems."""
    speeds, shares = [], []
    for outcome in outcomes:
        speeds.append(float(rates(outcome)[chosen].mean()))
        shares.append(100 * float(np.array(outcome.right[MEASURE])[chosen].mean()))
    return aup(speeds, shares, best)
