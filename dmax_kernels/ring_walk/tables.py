"""The demo's tables, and sentences about them that are computed from their numbers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from dmax_kernels.decoding import EntropyBound, Factor, Rule, TopN
from dmax_kernels.ring_walk.evaluate import TAUS, Cell, Result, ablation_rows

MODEL_NAMES = {"base": "base", "oput": "OPUT", "control": "control"}
RULE_NAMES = {
    "threshold": "confidence threshold",
    "hard": "hard-token revision",
    "hard_prefix": "hard-token rev., prefix",
    "hybrid": "hybrid, no prefix",
    "spd": "SPD",
}
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


def ablation_table(results: dict[Cell, Result]) -> str:
    """Rows of the paper's Table 3, three thresholds side by side."""
    lines = [
        " " * 33 + "".join(f" | {f'tau_dec {tau:g}':^{len(COLUMNS)}}" for tau in TAUS),
        f"{'model':<8} {'decoder':<24}" + f" | {COLUMNS}" * len(TAUS),
    ]
    lines.append("-" * len(lines[-1]))
    previous = None
    for model, rule in ablation_rows():
        if previous not in (None, model):
            lines.append("")
        cells = [results[Cell(model, rule, tau)] for tau in TAUS]
        name = MODEL_NAMES[model] if model != previous else ""
        lines.append(
            f"{name:<8} {RULE_NAMES[rule]:<24}" + "".join(f" | {figures(cell)}" for cell in cells)
        )
        previous = model
    few = {result.problems for result in results.values() if result.collapsed}
    if few:
        lines.append(
            f"* collapsed: no derivation right in the first {max(few)} problems, "
            "most passes in vain; not decoded further"
        )
    return "\n".join(lines)


def convergence_table(results: dict[Cell, Result]) -> str:
    """The paper's Table 4: OPUT with SPD at tau_dec 0.5."""
    lines = [f"{'a block converges by':<33} | {COLUMNS}"]
    lines.append("-" * len(lines[0]))
    for criterion in ("consistency", "confidence", "both"):
        result = results[Cell("oput", "spd", 0.5, criterion)]
        lines.append(f"{criterion:<33} | {figures(result)}")
    return "\n".join(lines)


def figures(result: Result) -> str:
    mark = "*" if result.collapsed else " "
    return (
        f"{100 * result.answer:6.1f}  {100 * result.strict:6.1f}{mark}"
        f"{result.tokens_per_forward:5.2f} {result.forwards_per_block:5.2f}"
    )


@dataclass(frozen=True)
class Finding:
    """A claim of the paper, whether this table confirms it, and the figures that decide."""

    claim: str
    holds: bool
    figures: str

    def __str__(self) -> str:
        return f"[{'yes' if self.holds else 'no'}] {self.claim}: {self.figures}."


def findings(results: dict[Cell, Result], problems: int) -> list[Finding]:
    """What the table says about the paper's claims. Every figure is read from the table."""

    def strict(model: str, rule: str, tau: float) -> float:
        return 100 * results[Cell(model, rule, tau)].strict

    def speed(model: str, rule: str, tau: float) -> float:
        return results[Cell(model, rule, tau)].tokens_per_forward

    def over_taus(model: str, rule: str) -> str:
        return " / ".join(f"{strict(model, rule, tau):.1f}" for tau in TAUS)

    noise = 2 * standard_error(0.9, problems)
    base_speed = speed("base", "threshold", 0.95)
    ratios = {tau: speed("oput", "spd", tau) / base_speed for tau in (0.5, 0.0)}
    collapse = max(strict(model, "spd", tau) for model in ("base", "control") for tau in TAUS)
    gain = {
        tau: strict("oput", "hard", tau) - strict("oput", "threshold", tau) for tau in (0.5, 0.0)
    }
    soft = strict("oput", "hybrid", 0.0) - strict("oput", "hard", 0.0)
    prefix = strict("oput", "spd", 0.5) - strict("oput", "hybrid", 0.5)
    return [
        Finding(
            "An aggressive threshold breaks the base model",
            strict("base", "threshold", 0.5) < strict("base", "threshold", 0.95) - 20,
            f"{over_taus('base', 'threshold')}% of its derivations are right at tau_dec "
            "0.95 / 0.5 / 0",
        ),
        Finding(
            "SPD collapses without OPUT",
            collapse < 5,
            f"base {over_taus('base', 'spd')}%, control {over_taus('control', 'spd')}% right",
        ),
        Finding(
            "OPUT with SPD keeps the derivations at several times the base's tokens per forward",
            strict("oput", "spd", 0.5) >= 95
            and strict("oput", "spd", 0.0) >= 88
            and min(ratios.values()) >= 3,
            f"{over_taus('oput', 'spd')}% right; {speed('oput', 'spd', 0.5):.2f} tokens per "
            f"forward at 0.5 ({ratios[0.5]:.1f}x the base at 0.95) and "
            f"{speed('oput', 'spd', 0.0):.2f} at 0 ({ratios[0.0]:.1f}x)",
        ),
        Finding(
            "OPUT makes revision work",
            min(gain.values()) > noise,
            f"revising hard tokens adds {gain[0.5]:+.1f} points at 0.5 and {gain[0.0]:+.1f} at 0 "
            "to the same model without revision",
        ),
        Finding(
            "Hybrid embeddings beat hard tokens when everything is decoded at once (tau_dec 0)",
            soft > noise,
            f"{soft:+.1f} points{within(soft, noise)}",
        ),
        Finding(
            "A contiguous prefix helps at tau_dec 0.5",
            prefix > noise,
            f"{prefix:+.1f} points{within(prefix, noise)}",
        ),
    ]


def caveat(results: dict[Cell, Result], problems: int) -> str:
    """What the paper's tables leave out: the control, decoded by an ordinary threshold."""
    base = results[Cell("base", "threshold", 0.95)]
    spd = results[Cell("oput", "spd", 0.5)]
    tau, control = best_control(results)
    gain = spd.tokens_per_forward - base.tokens_per_forward
    share = (control.tokens_per_forward - base.tokens_per_forward) / gain if gain > 0 else 1.0
    verdict = "most" if share >= 0.5 else "less than half"
    robust = " and ".join(
        f"{100 * ours.strict:.1f} against {100 * theirs.strict:.1f}% of derivations right at "
        f"tau_dec {tau:g}"
        for tau, ours, theirs in against_control(results)
    )
    adds = all(ours.strict > theirs.strict for _, ours, theirs in against_control(results))
    return (
        "What it does not show: that OPUT and SPD make all of the speed. The control, trained as "
        "long on the same self-distilled data by plain masked diffusion, gets "
        f"{100 * control.strict:.1f}% of derivations right at {control.tokens_per_forward:.2f} "
        f"tokens per forward with an ordinary threshold of {tau:g}; OPUT with SPD at 0.5 gets "
        f"{100 * spd.strict:.1f}% at {spd.tokens_per_forward:.2f}. So at this scale {verdict} of "
        f"the gain over the base's {base.tokens_per_forward:.2f} comes from self-distillation "
        f"({100 * min(share, 1):.0f}% of it). "
        f"{'What OPUT with SPD adds is' if adds else 'Nor does OPUT with SPD add'} robustness to "
        f"an aggressive threshold: {robust}. This is one model of 0.2 million parameters, one task "
        f"and one seed; with {problems} problems one standard error is "
        f"{standard_error(0.9, problems):.1f} points at 90%. Tokens per forward counts passes, "
        "not seconds, and the base's differ from the paper's, so the two ratios do not compare. "
        "SPD ends blocks by the default, settled rule; the paper's own ends them earlier where "
        "tau_dec is near 1 (docs/semantics.md)."
    )


def best_control(results: dict[Cell, Result]) -> tuple[float, Result]:
    """The control's fastest threshold that keeps 95 % of derivations, or its most accurate one."""
    rows = {
        cell.tau_dec: result
        for cell, result in results.items()
        if (cell.model, cell.rule) == ("control", "threshold")
    }
    keeps = {tau: result for tau, result in rows.items() if result.strict >= 0.95}
    if keeps:
        return max(keeps.items(), key=lambda row: row[1].tokens_per_forward)
    return max(rows.items(), key=lambda row: row[1].strict)


def against_control(results: dict[Cell, Result]) -> list[tuple[float, Result, Result]]:
    """(tau_dec, OPUT with SPD, control with the same threshold) where the threshold is low."""
    return [
        (tau, results[Cell("oput", "spd", tau)], results[Cell("control", "threshold", tau)])
        for tau in (0.5, 0.0)
    ]


def control_table(results: dict[Cell, Result]) -> str:
    """The control with an ordinary threshold: how far plain decoding gets on distilled data."""
    rows = [(cell.tau_dec, cell) for cell in results if cell.model == "control"]
    taus = sorted({tau for tau, cell in rows if cell.rule == "threshold"}, reverse=True)
    lines = [f"{'control, confidence threshold':<33} | {COLUMNS}"]
    lines.append("-" * len(lines[0]))
    for tau in taus:
        result = results[Cell("control", "threshold", tau)]
        lines.append(f"{f'tau_dec {tau:g}':<33} | {figures(result)}")
    return "\n".join(lines)


def standard_error(share: float, problems: int) -> float:
    """The standard error, in points, of a share measured on that many problems."""
    return 100 * (share * (1 - share) / problems) ** 0.5


def within(difference: float, noise: float) -> str:
    return "" if abs(difference) > noise else f", within two standard errors ({noise:.1f})"


def rule_cells(models: Iterable[str]) -> dict[Cell, tuple[str, str]]:
    """Every cell with its (model, label)."""
    return {
        Cell(model, rule, tau, trace=True): (model, label)
        for model in models
        for label, rule, tau in RULES
    }


def rules_table(results: dict[Cell, Result], cells: dict[Cell, tuple[str, str]]) -> str:
    """One row per model and rule, in the order of `cells`."""
    lines = [f"{'model':<8} {'rule':<25} | {COLUMNS}   ARness"]
    lines.append("-" * len(lines[0]))
    previous = None
    for cell, (model, label) in cells.items():
        if previous not in (None, model):
            lines.append("")
        result = results[cell]
        name = MODEL_NAMES[model] if model != previous else ""
        lines.append(
            f"{name:<8} {label:<25} | {100 * result.answer:6.1f}  {100 * result.strict:6.1f} "
            f"{result.tokens_per_forward:5.2f} {result.forwards_per_block:5.2f}   "
            f"{result.arness:6.2f}"
        )
        previous = model
    return "\n".join(lines)


def rules_json(
    results: dict[Cell, Result], cells: dict[Cell, tuple[str, str]]
) -> list[dict[str, Any]]:
    return [
        {"model": model, "rule": label, "tau_dec": cell.tau_dec, **vars(results[cell])}
        for cell, (model, label) in cells.items()
    ]
