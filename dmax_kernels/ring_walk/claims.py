"""The paper's claims about its tables, each with the test that decides it.

The claims, their tests and all margins were written down before the models of the ladder were
decoded, and none was changed after that. (What the recipe's own three checkpoints do was known, and
the figures of an earlier trial of 200 steps.) They name rows by method, so that the same claims are
judged after any number of training steps. Each is judged twice: by "answer" (the last place is
right, the analogue of the paper's accuracy) and by "strict" (so is every step).

A claim holds if all of its tests do (`judging.py`), and fails if one of them does. The intervals
are not corrected for the number of claims.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dmax_kernels.evaluation.cells import Cell
from dmax_kernels.ring_walk.judging import (
    AREAS,
    FAILS,
    HOLDS,
    UNDECIDED,
    Collapses,
    Faster,
    Judged,
    Keeps,
    LargerArea,
    More,
    NotFaster,
    Outcomes,
    Test,
)


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
    """The verdicts in the order of `CLAIMS`."""
    return [
        {
            "verdict": verdict,
            "tests": [vars(each) for each in judged],
        }
        for _, verdict, judged in judge_all(outcomes, measure)
    ]
