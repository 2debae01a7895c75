"""Measured rows as tables and verdicts: `python -m dmax_kernels.gsm.report FOLDER`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from dmax_kernels.evaluation.cells import Cell, Outcome
from dmax_kernels.evaluation.metrics import share_interval
from dmax_kernels.evaluation.report import Report
from dmax_kernels.files import check_output, read_json, save_json
from dmax_kernels.gsm.bundle import Bundle
from dmax_kernels.gsm.claims import verdicts
from dmax_kernels.gsm.recipe import LOG
from dmax_kernels.gsm.stages import Recipe

METHODS = {
    ("base", "threshold"): "masked diffusion, threshold (the base)",
    ("base", "hierarchical"): "the base, hierarchical decoding",
    ("base", "spd"): "the base, SPD without OPUT",
    ("certainty", "threshold"): "certainty forcing (dParallel), threshold",
    ("certainty", "spd"): "certainty forcing, SPD",
    ("uniform", "uniform"): "uniform diffusion, its own decoding",
    ("uniform", "hard"): "uniform diffusion, hard tokens",
    ("uniform", "threshold"): "uniform diffusion, threshold",
    ("control", "threshold"): "control (masked diffusion on the same data), threshold",
    ("control", "spd"): "control, SPD",
    ("oput", "threshold"): "OPUT, threshold",
    ("oput", "hard"): "OPUT, hard tokens",
    ("oput", "hard_prefix"): "OPUT, hard tokens and prefix",
    ("oput", "hybrid"): "OPUT, hybrid embeddings, no prefix",
    ("oput", "spd"): "DMax: OPUT, SPD",
}
COLUMNS = ["method", "tau_dec", "answer %", "strict %", "tokens per forward", "AUP (answer)"]


def rows_by_split(bundle: Bundle) -> dict[str, dict[Cell, Outcome]]:
    found: dict[str, dict[Cell, Outcome]] = {"test": {}, "new_template": {}}
    for row in bundle.rows():
        found[row.split][row.cell] = row.outcome
    return found


def table_rows(rows: dict[Cell, Outcome]) -> list[list[str]]:
    """The methods in the order of `METHODS`; AUP beside a method's first threshold."""
    aups = Report(rows).aups()
    lines = []
    for method, name in METHODS.items():
        cells = sorted((c for c in rows if (c.model, c.rule) == method), key=lambda c: -c.tau_dec)
        for place, cell in enumerate(cells):
            outcome = rows[cell]
            shares = [interval_text(outcome, measure) for measure in ("answer", "strict")]
            rate = f"{outcome.tokens_per_forward(count_eos=False):.2f}"
            score = "" if place or len(cells) == 1 else f"{aups[method]['answer']:.0f}"
            lines.append([name if place == 0 else "", f"{cell.tau_dec:g}", *shares, rate, score])
    return lines


def interval_text(outcome: Outcome, measure: str) -> str:
    low, high = share_interval(sum(outcome.right[measure]), outcome.problems)
    text = f"{100 * outcome.share(measure):.1f} [{100 * low:.1f}, {100 * high:.1f}]"
    return f"{text} of {outcome.problems}, collapsed" if outcome.collapsed else text


def as_page(folder: Path) -> dict[str, Any]:
    """What the page of reproductions reads: tables and claims."""
    bundle, log = Bundle.open(folder), read_json(folder / LOG, "the log")
    rows = rows_by_split(bundle)
    note = narrowing(bundle, log)
    # A base model that has not been narrowed to what it learnt says nothing about the claims
    judged = rows["test"] if "distillation" in log else {}
    note += (
        " Tokens per forward: mean over the problems, without the end token. AUP over the method's "
        "thresholds in the table."
    )
    steps = {name: stage["config"]["steps"] for name, stage in log["stages"].items()}
    return {
        "title": "Real language: GSM-Symbolic's templates",
        "command": log["command"],
        "made_with": (
            f"{log['device']}, torch {log['versions']['torch']}, {log['parameters']:,} parameters, "
            f"one seed, Muon and AdamW, greedy rollout, steps "
            f"{', '.join(f'{name} {number}' for name, number in steps.items())}"
        ),
        "tables": [
            {
                "title": "Tables 1 to 3 on word problems",
                "columns": COLUMNS,
                "rows": table_rows(rows["test"]),
                "note": note,
            },
            {
                "title": "Templates that no model has seen",
                "columns": COLUMNS,
                "rows": table_rows(rows["new_template"]),
                "note": "Problems of templates that were held out whole.",
            },
        ],
        "claims": [
            {
                "where": each.claim.where,
                "claim": each.claim.text,
                "verdict": each.verdict,
                "figures": each.figures,
            }
            for each in verdicts(judged)
        ],
    }


def narrowing(bundle: Bundle, log: dict[str, Any]) -> str:
    """Which templates the measured problems are of, in a sentence or two."""
    count, learnt = len(bundle.problems["test"]), bundle.learnt
    if "distillation" not in log:
        return (
            f"{count} held-out problems of all {len(learnt)} templates. The run ended before its "
            "distillation was complete: nothing was narrowed, and only the base was trained."
        )
    drawn = log["distillation"]["share_right"]
    found = {number: drawn[str(number)] for number in learnt}
    shares = ", ".join(f"{number} ({share:.0%})" for number, share in found.items())
    enough = Recipe().learnt
    best = "" if min(found.values()) >= enough else f", or the best {len(learnt)}, since fewer do"
    return (
        f"{count} held-out problems of {len(learnt)} of the {len(drawn)} templates: those of which "
        f"the base model answers at least {enough:.0%} of fresh training problems right{best}. "
        f"They are {shares}."
    )


def page_text(page: dict[str, Any]) -> str:
    lines = [page["title"], page["made_with"]]
    for table in page["tables"]:
        cells = [table["columns"], *table["rows"]]
        widths = [max(len(row[i]) for row in cells) for i in range(len(COLUMNS))]
        lines += ["", table["title"]]
        for row in cells:
            lines.append("  ".join(f"{text:<{w}}" for text, w in zip(row, widths, strict=True)))
        lines.append(table["note"])
    lines.append("")
    for claim in page["claims"]:
        lines.append(f"{claim['verdict']:9}  {claim['where']}: {claim['claim']}")
        if claim["figures"]:
            lines.append(f"{'':9}  {claim['figures']}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dmax_kernels.gsm.report", description="Tables and verdicts of a run."
    )
    parser.add_argument("folder", type=Path, help="what `train --config gsm` exported")
    parser.add_argument("--json", type=Path, metavar="FILE", help="for docs/reproduction")
    args = parser.parse_args()
    try:
        if args.json is not None:
            check_output("--json", args.json)
        page = as_page(args.folder)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(page_text(page))
    if args.json is not None:
        save_json(args.json, page)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
