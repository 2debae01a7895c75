"""The paper's Tables 1 to 5 from the outcomes, and a verdict on each of its claims.

The claims and what decides them were written down before any outcome was seen. A claim compares
two ways to decode on the same problems. It holds where the interval of 95 % of the paired
difference (`evaluation.metrics.paired`, over the problems of all seeds) lies above 0, it fails
where the interval lies below, and it is open in between. Where a claim has several comparisons,
all of them have to hold, and one that fails is enough to fail.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from dmax_kernels.evaluation.metrics import paired, share_interval
from dmax_kernels.ring_walk.nap.arms import BUDGETS, Decoding, decodings
from dmax_kernels.ring_walk.nap.data import ARMS

PAPER_BUDGETS = (1, 2, 3, 4)
NAMES = {"base": "base", "long_chain": "long chain", "nap_1": "NAP, 1 path"} | {
    "nap_2": "NAP, 2 paths",
    "nap_3": "NAP, 3 paths",
}
ORDERS = {"ao": "AO", "parallel": "parallel-forced", "random": "random", "ar": "AR"}

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

    table: str
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
    decided = "holds" if min(lows) > 0 else "fails" if min(highs) < 0 else "open"
    return {
        "table": claim.table,
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
    half = 1.96 * (sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values)) ** 0.5
    low, high = 100 * (mean - half), 100 * (mean + half)
    return {
        "table": "Table 3",
        "claim": "what NAP gains on the long chain grows from 1 to 4 tokens per step",
        "verdict": "holds" if low > 0 else "fails" if high < 0 else "open",
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
    for table, text, more, less in pairs:
        first, second = mean(more), mean(less)
        holds = first > second and (table != "Table 1" or first > max(0.5, 2 * second))
        figures = {"more": list(more), "less": list(less), "arness": [first, second]}
        found.append(
            {
                "table": table,
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
    decided = "holds" if difference > half else "fails" if difference < -half else "open"
    return {
        "table": "Figures 3 and 7",
        "claim": "paths side by side have less sequential dependence per token than a chain's "
        "steps",
        "verdict": decided,
        "comparisons": [{"nats_per_token": [chain, parallel], "half_width": round(half, 4)}],
    }


def report(outcomes: Sequence[dict[str, Any]], scored: dict[str, Any]) -> dict[str, Any]:
    rows = gather(outcomes)
    cells = []
    for (arm, order, tokens_per_step), row in rows.items():
        low, high = share_interval(sum(row.right), len(row.right))
        cells.append(
            {
                "arm": arm,
                "order": order,
                "tokens_per_step": tokens_per_step,
                "problems": len(row.right),
                "answer": round(row.share, 4),
                "interval": [round(low, 4), round(high, 4)],
                "by_seed": [round(share, 4) for share in row.by_seed],
                "forwards": row.forwards,
                "arness": round(sum(row.arness) / len(row.arness), 4),
                "fair_arness": round(sum(row.fair_arness) / len(row.fair_arness), 4),
            }
        )
    verdicts = [verdict(claim, rows) for claim in claims()]
    verdicts.insert(1, gap_claim(rows))
    verdicts += [*order_claims(rows), seq_dep_claim(scored)]
    return {"cells": cells, "claims": verdicts, "seq_dep": scored}


def tables(found: dict[str, Any]) -> str:
    """The tables as text, with the claims below."""
    cells = {(c["arm"], c["order"], c["tokens_per_step"]): c for c in found["cells"]}
    head = f"{'answers right, %, by tokens per step':<32}" + "".join(f"{n:>7}" for n in BUDGETS)
    lines = [f"{head}   ARness@1 (fair)", "-" * (len(head) + 18)]
    for arm in ARMS:
        for order in dict.fromkeys(how.order for how in decodings(arm)):
            row = f"{NAMES[arm]:<14}{ORDERS[order]:<18}"
            for n in BUDGETS:
                cell = cells.get((arm, order, n))
                row += f"{100 * cell['answer']:7.1f}" if cell else " " * 7
            at_one = cells[arm, order, 1]
            lines.append(f"{row}   {at_one['arness']:.2f} ({at_one['fair_arness']:.2f})")
    lines.append("")
    for claim in found["claims"]:
        figures = "; ".join(figures_of(each) for each in claim["comparisons"])
        lines.append(f"[{claim['verdict']}] {claim['table']}: {claim['claim']}: {figures}")
    return "\n".join(lines)


def figures_of(comparison: dict[str, Any]) -> str:
    if "points" in comparison:
        low, high = comparison["interval"]
        return f"{comparison['points']:+.1f} points ({low:+.1f} to {high:+.1f})"
    if "arness" in comparison:
        return "{:.2f} against {:.2f}".format(*comparison["arness"])
    chain, parallel = comparison["nats_per_token"]
    return f"{chain:.2f} against {parallel:.2f} nats per token"


def find(outcomes: Iterable[dict[str, Any]], arm: str, how: Decoding) -> list[list[int]]:
    """The order in which the first problem was decoded."""
    outcome = next(each for each in outcomes if each["arm"] == arm)
    wanted = how.order, how.tokens_per_step
    cells = {(cell["order"], cell["tokens_per_step"]): cell for cell in outcome["cells"]}
    return cells[wanted]["first_order"]
