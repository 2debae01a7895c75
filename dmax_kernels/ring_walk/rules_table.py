"""The table of `demo --rules`: every decoding rule on each checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from dmax_kernels.decoding import EntropyBound, Factor, Rule, TopN
from dmax_kernels.evaluation.cells import Cell, Outcome
from dmax_kernels.ring_walk.evaluate import Result

MODEL_NAMES = {"base": "base", "oput": "OPUT", "control": "control"}
COLUMNS = "answer  strict   t/f   f/b"
# The table of `demo --rules`: label, rule, tau_dec (0 where the rule asks for no threshold)
RULES: tuple[tuple[str, str | Rule, float], ...] = (
    ("autoregressive", "autoregressive", 0),
    ("random", "random", 0),
    ("top 1", "top_n", 0),
    ("top 2", TopN(2), 0),
    ("threshold 0.95", "threshold", 0.95),
    ("threshold 0.5", "threshold", 0.5),
    ("margin 0.9", "margin", 0.9),
    ("factor 1", "factor", 0),
    ("factor 0.5", Factor(0.5), 0),
    ("entropy bound 0.1", "entropy_bound", 0),
    ("entropy bound 0.5", EntropyBound(0.5), 0),
    ("hierarchical 0.9 / 0.2", "hierarchical", 0.9),
    ("local leap 0.9 / 0.75", "local_leap", 0.9),
    ("credit 0.95", "credit", 0.95),
    ("Prophet", "prophet", 0),
    ("SchED", "sched", 0),
    ("parallel-forced, 3 slots", "parallel_forced", 0),
    ("token editing 0.7 / 0.5", "edit", 0.7),
    ("uniform", "uniform", 0),
    ("SPD 0.5", "spd", 0.5),
)


def rule_cells(models: Iterable[str]) -> dict[Cell, tuple[str, str]]:
    """Every cell with its (model, label)."""
    return {
        Cell(model, rule, tau, trace=True): (model, label)
        for model in models
        for label, rule, tau in RULES
    }


def rules_table(outcomes: Mapping[Cell, Outcome], cells: dict[Cell, tuple[str, str]]) -> str:
    """One row per model and rule, in the order of `cells`."""
    lines = [f"{'model':<8} {'rule':<25} | {COLUMNS}   ARness"]
    lines.append("-" * len(lines[0]))
    previous = None
    for cell, (model, label) in cells.items():
        if previous not in (None, model):
            lines.append("")
        result = Result.of(outcomes[cell])
        name = MODEL_NAMES[model] if model != previous else ""
        lines.append(
            f"{name:<8} {label:<25} | {100 * result.answer:6.1f}  {100 * result.strict:6.1f} "
            f"{result.tokens_per_forward:5.2f} {result.forwards_per_block:5.2f}   "
            f"{result.arness:6.2f}"
        )
        previous = model
    return "\n".join(lines)


def rules_json(
    outcomes: Mapping[Cell, Outcome], cells: dict[Cell, tuple[str, str]]
) -> list[dict[str, Any]]:
    return [
        {"model": model, "rule": label, "tau_dec": cell.tau_dec, **vars(Result.of(outcomes[cell]))}
        for cell, (model, label) in cells.items()
    ]
