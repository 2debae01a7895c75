"""The paper's claims about accuracy, order and sequential dependence, and a verdict on each.

The claims and what decides them were written down before any outcome was seen. A claim compares
two ways to decode on the same problems. It holds where the interval of 95 % of the paired
difference (`evaluation.metrics.paired`, over the problems of all seeds) lies above 0, it fails
where the interval lies below, and it is undecided in between. Where a claim has several
comparisons, all of them have to hold, and one that fails is enough to fail.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from dmax_kernels.evaluation.metrics import paired
from dmax_kernels.ring_walk.nap.data import ARMS

PAPER_BUDGETS = (1, 2, 3, 4)

Key = tuple[str, str, int]  # arm, order, tokens per step


@dataclass
class Row:
    """One way to decode one arm, over all seeds: their problems are one after another."""

    right: list[bool] = field(default_factory=list)
    by_seed: list[float] = field(default_factory=list)
    arness: list[float] = field(default_factory=list)
    fair_arness: list[float] = field(default_factory=list)
    forwards: int = 0

    @property
    def share(self) -> float:
        return sum(self.right) / len(self.right)


def gather(outcomes: Iterable[dict[str, Any]]) -> dict[Key, Row]:
    rows: dict[Key, Row] = {}
    for outcome in sorted(outcomes, key=lambda each: (ARMS.index(each["arm"]), each["seed"])):
        for cell in outcome["cells"]:
            row = rows.setdefault((outcome["arm"], cell["order"], cell["tokens_per_step"]), Row())
            row.right += cell["right"]
            row.by_seed.append(sum(cell["right"]) / len(cell["right"]))
            row.arness.append(cell["arness"])
            row.fair_arness.append(cell["fair_arness"])
            row.forwards = cell["forwards"]
    return rows


@dataclass(frozen=True)
class Claim:
    """One claim of the paper. `better` and `worse` are pairs of rows to compare, one by one."""

    where: str
    text: str
    better: Sequence[Key]
    worse: Sequence[Key]


def claims() -> list[Claim]:
    """Those about accuracy, which `verdict` decides; see `order_claims` for those about order."""
    nap = [("nap_3", "parallel", n) for n in PAPER_BUDGETS]
    return [
        Claim(
            "Table 3",
            "NAP is more accurate than the long chain at 1, 2, 3 and 4 tokens per step",
            nap,
            [("long_chain", "ao", n) for n in PAPER_BUDGETS],
        ),
        Claim(
            "Table 3",
            "NAP is more accurate than the base at 1, 2, 3 and 4 tokens per step",
            nap,
            [("base", "ao", n) for n in PAPER_BUDGETS],
        ),
        Claim(
            "Table 4",
            "without NAP's data, parallel-forced decoding is less accurate than AO (1, 2, 4)",
            [("base", "ao", n) for n in (1, 2, 4)],
            [("base", "parallel", n) for n in (1, 2, 4)],
        ),
        Claim(
            "Table 4",
            "with NAP's data, parallel-forced decoding is more accurate than AO at 4 tokens per "
            "step",
            [("nap_3", "parallel", 4)],
            [("nap_3", "ao", 4)],
        ),
        Claim(
            "Table 5",
            "three paths are more accurate than one with the same total of tokens",
            [("nap_3", "parallel", 1)],
            [("nap_1", "parallel", 1)],
        ),
        Claim(
            "Figure 2",
            "a random order is less accurate than AO",
            [("base", "ao", 1)],
            [("base", "random", 1)],
        ),
    ]


def verdict(claim: Claim, rows: dict[Key, Row]) -> dict[str, Any]:
    comparisons = []
    for better, worse in zip(claim.better, claim.worse, strict=True):
        first, second = same_length(rows[better].right, rows[worse].right)
        difference = paired(first, second)
        comparisons.append(
            {
                "better": list(better),
                "worse": list(worse),
                "points": round(100 * difference.difference, 2),
                "interval": [round(100 * difference.low, 2), round(100 * difference.high, 2)],
                "p_value": difference.p_value,
                "problems": difference.problems,
            }
        )
    lows = [each["interval"][0] for each in comparisons]
    highs = [each["interval"][1] for each in comparisons]
    decided = "holds" if min(lows) > 0 else "fails" if min(highs) < 0 else "undecided"
    return {
        "where": claim.where,
        "claim": claim.text,
        "verdict": decided,
        "comparisons": comparisons,
    }


def same_length(first: list[bool], second: list[bool]) -> tuple[list[bool], list[bool]]:
    """The base is trained once: its problems are compared with those of every seed."""
    longest = max(len(first), len(second))
    return first * (longest // len(first)), second * (longest // len(second))


def gap_claim(rows: dict[Key, Row]) -> dict[str, Any]:
    """Table 3: what NAP gains on the long chain grows from 1 to 4 tokens per step.

    The difference of two paired differences, per problem; the interval is normal.
    """
    values = [
        (a - b) - (c - d)
        for a, b, c, d in zip(
            rows["nap_3", "parallel", 4].right,
            rows["long_chain", "ao", 4].right,
            rows["nap_3", "parallel", 1].right,
            rows["long_chain", "ao", 1].right,
            strict=True,
        )
    ]
    mean = sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / max(len(values) - 1, 1)
    half = 1.96 * (variance / len(values)) ** 0.5
    low, high = 100 * (mean - half), 100 * (mean + half)
    return {
        "where": "Table 3",
        "claim": "what NAP gains on the long chain grows from 1 to 4 tokens per step",
        "verdict": "holds" if low > 0 else "fails" if high < 0 else "undecided",
        "comparisons": [
            {
                "points": round(100 * mean, 2),
                "interval": [round(low, 2), round(high, 2)],
                "problems": len(values),
            }
        ],
    }


def order_claims(rows: dict[Key, Row]) -> list[dict[str, Any]]:
    """Claims about Global-ARness@1 at one token per step: by the means, without an interval."""

    def mean(key: Key) -> float:
        return sum(rows[key].arness) / len(rows[key].arness)

    pairs = (
        (
            "Table 1",
            "AO is much closer to left to right than a random order (ARness over 0.5, and over "
            "twice that of random)",
            ("base", "ao", 1),
            ("base", "random", 1),
        ),
        (
            "Table 2",
            "training on long chains raises the ARness of AO",
            ("long_chain", "ao", 1),
            ("base", "ao", 1),
        ),
        (
            "Figure 1",
            "NAP decodes less from left to right than the long chain",
            ("long_chain", "ao", 1),
            ("nap_3", "parallel", 1),
        ),
    )
    found = []
    for where, text, more, less in pairs:
        first, second = mean(more), mean(less)
        holds = first > second and (where != "Table 1" or first > max(0.5, 2 * second))
        figures = {"more": list(more), "less": list(less), "arness": [first, second]}
        found.append(
            {
                "where": where,
                "claim": text,
                "verdict": "holds" if holds else "fails",
                "comparisons": [figures],
            }
        )
    return found


def seq_dep_claim(scored: dict[str, Any]) -> dict[str, Any]:
    """Figures 3 and 7: a token gains more from what is before it in a chain than side by side."""
    (chain, error), (parallel, other) = (
        scored[kind]["per_token"] for kind in ("chain", "parallel")
    )
    half = 1.96 * (error**2 + other**2) ** 0.5
    difference = chain - parallel
    decided = "holds" if difference > half else "fails" if difference < -half else "undecided"
    return {
        "where": "Figures 3 and 7",
        "claim": "paths side by side have less sequential dependence per token than a chain's "
        "steps",
        "verdict": decided,
        "comparisons": [{"nats_per_token": [chain, parallel], "half_width": round(half, 4)}],
    }


def verdicts(rows: dict[Key, Row], scored: dict[str, Any]) -> list[dict[str, Any]]:
    """Every claim with its verdict, the comparisons that decide it, and these in words."""
    found = [verdict(claim, rows) for claim in claims()]
    found.insert(1, gap_claim(rows))
    found += [*order_claims(rows), seq_dep_claim(scored)]
    for each in found:
        each["figures"] = "; ".join(figures_of(comparison) for comparison in each["comparisons"])
    return found


def figures_of(comparison: dict[str, Any]) -> str:
    if "points" in comparison:
        low, high = comparison["interval"]
        return f"{comparison['points']:+.1f} points ({low:+.1f} to {high:+.1f})"
    if "arness" in comparison:
        return "{:.2f} against {:.2f}".format(*comparison["arness"])
    chain, parallel = comparison["nats_per_token"]
    return f"{chain:.2f} against {parallel:.2f} nats per token"
