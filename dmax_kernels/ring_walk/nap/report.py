"""The paper's Tables 1 to 5 from the outcomes of the arms, and their text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from dmax_kernels.evaluation.metrics import share_interval
from dmax_kernels.ring_walk.nap.arms import BUDGETS, Decoding, decodings
from dmax_kernels.ring_walk.nap.claims import Key, Row, gather, verdicts
from dmax_kernels.ring_walk.nap.data import ARMS

NAMES = {"base": "base", "long_chain": "long chain", "nap_1": "NAP, 1 path"} | {
    "nap_2": "NAP, 2 paths",
    "nap_3": "NAP, 3 paths",
}
ORDERS = {"ao": "AO", "parallel": "parallel-forced", "random": "random", "ar": "AR"}


def report(outcomes: Sequence[dict[str, Any]], scored: dict[str, Any]) -> dict[str, Any]:
    rows = gather(outcomes)
    measured = []
    for (arm, order, tokens_per_step), row in rows.items():
        low, high = share_interval(sum(row.right), len(row.right))
        measured.append(
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
    return {
        "title": "NAP on ring walks",
        "tables": [accuracy_table(rows), order_table(rows), seq_dep_table(scored)],
        "claims": verdicts(rows, scored),
        "measured": measured,
        "seq_dep": scored,
    }


def accuracy_table(rows: dict[Key, Row]) -> dict[str, Any]:
    lines = []
    for arm in ARMS:
        for order in dict.fromkeys(how.order for how in decodings(arm)):
            line = [f"{NAMES[arm]}, {ORDERS[order]}"]
            for n in BUDGETS:
                row = rows.get((arm, order, n))
                line.append("")
                if row is not None:
                    low, high = share_interval(sum(row.right), len(row.right))
                    line[-1] = f"{100 * row.share:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
            lines.append(line)
    counts = sorted({len(row.right) for row in rows.values()})
    return {
        "title": "Tables 3, 4 and 5, Figure 2: right answers, %, with intervals of 95 %",
        "columns": ["training, decoding", *(f"Tok/Step {n}" for n in BUDGETS)],
        "rows": lines,
        "note": f"Held-out problems times seeds in a cell: {' or '.join(map(str, counts))}. All "
        "responses have 170 positions; parallel-forced decodes paths and summary of a canvas, "
        "and the others the whole response.",
    }


def order_table(rows: dict[Key, Row]) -> dict[str, Any]:
    lines = []
    for (arm, order, n), row in rows.items():
        if n == 1 or (order in ("ao", "parallel") and n == 4):
            means = [sum(each) / len(each) for each in (row.arness, row.fair_arness)]
            name = f"{NAMES[arm]}, {ORDERS[order]}"
            lines.append([name, str(n), *(f"{mean:.2f}" for mean in means)])
    return {
        "title": "Tables 1 and 2: Global-ARness@1",
        "columns": ["training, decoding", "Tok/Step", "ties left to right", "ties fair"],
        "rows": lines,
        "note": "The two agree where a step commits one token.",
    }


def seq_dep_table(scored: dict[str, Any]) -> dict[str, Any]:
    names = ("seq_dep", "per_token", "first_gain", "last_gain")
    kinds = {"chain": "a chain, by its moves", "parallel": "paths side by side"}
    return {
        "title": "Figures 3 and 7: Sequential Dependence, nats with standard errors",
        "columns": ["text", "SeqDep (per segment)", "per token", "second segment", "last segment"],
        "rows": [
            [kinds[kind], *(f"{m:.2f} ± {e:.2f}" for m, e in (scored[kind][n] for n in names))]
            for kind in kinds
        ],
        "note": f"{scored['problems']} held-out problems, scored by a Llama of 0.2 million "
        f"parameters after {scored['steps']} steps on both kinds of text.",
    }


def as_text(found: dict[str, Any]) -> str:
    """The tables, and the claims below."""
    lines = []
    for table in found["tables"]:
        cells = [table["columns"], *table["rows"]]
        widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
        lines += [table["title"], ""]
        for row in cells:
            lines.append("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)))
        lines += ["", table["note"], ""]
    lines += [
        f"[{claim['verdict']}] {claim['where']}: {claim['claim']}: {claim['figures']}"
        for claim in found["claims"]
    ]
    return "\n".join(lines)


def find(outcomes: Iterable[dict[str, Any]], arm: str, how: Decoding) -> list[list[int]]:
    """The order in which the first problem was decoded."""
    outcome = next(each for each in outcomes if each["arm"] == arm)
    wanted = how.order, how.tokens_per_step
    cells = {(cell["order"], cell["tokens_per_step"]): cell for cell in outcome["cells"]}
    return cells[wanted]["first_order"]
