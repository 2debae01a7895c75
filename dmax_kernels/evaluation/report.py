"""The rows of an evaluation as tables and as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from dmax_kernels.evaluation.cells import Cell, Outcome
from dmax_kernels.evaluation.metrics import Paired, aup, paired, share_interval

# Of the tokens per forward pass: name in JSON, heading, arguments of `Outcome.tokens_per_forward`
RATES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("tokens_per_forward_mean", "mean", {"average": "mean"}),
    ("tokens_per_forward_sum", "sum", {"average": "sum"}),
    ("tokens_per_forward_mean_without_eos", "mean-e", {"average": "mean", "count_eos": False}),
    ("tokens_per_forward_sum_without_eos", "sum-e", {"average": "sum", "count_eos": False}),
)
LEGEND = """\
Shares are % right, with the half width of an interval of 95 % (Wilson). mean, sum: tokens per
forward pass, as the mean of the problems' ratios and as all tokens over all passes; -e: without the
end-of-sequence token. f/b: forward passes per block. tok/s: tokens per second of prefill and
decoding. AUP: accuracy under parallelism of a model and rule over its thresholds (d3LLM's formula,
with mean-e, which is what the paper's authors print as TPF)."""
COLLAPSED = (
    "* collapsed: none right in the first {} problems, most passes in vain; not decoded further"
)


@dataclass(frozen=True)
class Report:
    """Every cell with its outcome, in the order in which they were asked for."""

    rows: dict[Cell, Outcome]
    baseline: int = 0  # the row that the others are compared with

    @property
    def measures(self) -> list[str]:
        return list(next(iter(self.rows.values())).right)

    def series(self) -> dict[tuple[str, str], list[Cell]]:
        """The cells of each model and rule: one point per threshold."""
        found: dict[tuple[str, str], list[Cell]] = {}
        for cell in self.rows:
            found.setdefault((cell.model, rule_name(cell)), []).append(cell)
        return found

    def aups(self) -> dict[tuple[str, str], dict[str, float]]:
        """Accuracy under parallelism of each model and rule, by measure; y_max is over all rows."""
        scores: dict[tuple[str, str], dict[str, float]] = {}
        for measure in self.measures:
            best = max(100 * outcome.share(measure) for outcome in self.rows.values())
            for name, cells in self.series().items():
                outcomes = [self.rows[cell] for cell in cells]
                rates = [each.tokens_per_forward(count_eos=False) for each in outcomes]
                shares = [100 * each.share(measure) for each in outcomes]
                scores.setdefault(name, {})[measure] = (
                    aup(rates, shares, best) if min(rates) > 0 else 0.0
                )
        return scores

    def comparisons(self) -> Iterator[tuple[int, int, str, Paired]]:
        """(row, row, measure, how they differ on the same problems) of every two rows."""
        outcomes = list(self.rows.values())
        for one in range(len(outcomes)):
            for other in range(one + 1, len(outcomes)):
                for measure in self.measures:
                    first, second = (outcomes[i].right[measure] for i in (one, other))
                    yield one, other, measure, paired(first, second)

    def as_dict(self) -> dict[str, Any]:
        return {
            "rows": [{**named(cell), **figures(outcome)} for cell, outcome in self.rows.items()],
            "aup": [
                {"model": model, "rule": rule, **{f"aup_{m}": score for m, score in by.items()}}
                for (model, rule), by in self.aups().items()
            ],
            "paired": [
                {"first": one, "second": other, "measure": measure, **asdict(difference)}
                for one, other, measure, difference in self.comparisons()
            ],
        }

    def table(self) -> str:
        """One line per row, and under it AUP and the differences from the baseline."""
        names = [(cell.model, rule_name(cell), f"{cell.tau_dec:g}") for cell in self.rows]
        widths = [max(map(len, column)) for column in zip(*names, HEADINGS, strict=True)]
        head = "  ".join(f"{h:<{w}}" for h, w in zip(HEADINGS, widths, strict=True))
        head = f"    {head} |" + "".join(f" {measure:^13}" for measure in self.measures)
        head += " |" + "".join(f" {heading:>6}" for _, heading, _ in RATES) + "    f/b   tok/s"
        lines = [head, "-" * len(head)]
        for number, (name, outcome) in enumerate(zip(names, self.rows.values(), strict=True)):
            label = "  ".join(f"{text:<{w}}" for text, w in zip(name, widths, strict=True))
            mark = "*" if outcome.collapsed else " "
            shares = "".join(f" {share_text(outcome, measure)}" for measure in self.measures)
            rates = "".join(f" {outcome.tokens_per_forward(**how):6.2f}" for *_, how in RATES)
            lines.append(
                f"{number:>3} {label} |{shares}{mark}|{rates} {outcome.forwards_per_block:6.2f} "
                f"{outcome.tokens_per_second:7.0f}"
            )
        few = [outcome.problems for outcome in self.rows.values() if outcome.collapsed]
        if few:
            lines.append(COLLAPSED.format(max(few)))
        return "\n".join([*lines, "", *self.aup_lines(), *self.paired_lines()])

    def aup_lines(self) -> list[str]:
        scores = self.aups()
        width = max(len(f"{model} {rule}") for model, rule in scores)
        lines = [f"{'AUP':<{width}}" + "".join(f" {measure:>8}" for measure in self.measures)]
        for (model, rule), by_measure in scores.items():
            values = "".join(f" {by_measure[measure]:8.0f}" for measure in self.measures)
            lines.append(f"{f'{model} {rule}':<{width}}{values}")
        return lines

    def paired_lines(self) -> list[str]:
        """Each row less the baseline, in points, with its interval and p-value."""
        lines, outcomes = [], list(self.rows.values())
        for number, outcome in enumerate(outcomes):
            if number == self.baseline:
                continue
            texts = []
            for measure in self.measures:
                change = paired(outcome.right[measure], outcomes[self.baseline].right[measure])
                texts.append(
                    f"{measure} {100 * change.difference:+.1f} "
                    f"[{100 * change.low:+.1f}, {100 * change.high:+.1f}] p {change.p_value:.1g}"
                )
            lines.append(f"{number:>3} - {self.baseline}: " + "; ".join(texts))
        if lines:
            heading = "Points more than row {}, on the same problems, interval of 95 %, McNemar's p"
            lines = ["", heading.format(self.baseline), *lines]
        return lines


HEADINGS = ("model", "rule", "tau")


def rule_name(cell: Cell) -> str:
    return cell.rule if isinstance(cell.rule, str) else repr(cell.rule)


def named(cell: Cell) -> dict[str, Any]:
    return {**asdict(cell), "rule": rule_name(cell)}


def share_text(outcome: Outcome, measure: str) -> str:
    low, high = share_interval(sum(outcome.right[measure]), outcome.problems)
    return f"{100 * outcome.share(measure):6.1f} ± {50 * (high - low):4.1f}"


def figures(outcome: Outcome) -> dict[str, Any]:
    """What JSON has of an outcome: shares in [0, 1], rates, and what happened to each problem."""
    return {
        **{measure: outcome.share(measure) for measure in outcome.right},
        **{name: outcome.tokens_per_forward(**how) for name, _, how in RATES},
        "forwards_per_block": outcome.forwards_per_block,
        "tokens_per_second": outcome.tokens_per_second,
        "problems": outcome.problems,
        "incomplete": outcome.complete.count(False),
        "collapsed": outcome.collapsed,
        "per_problem": {
            "right": outcome.right,
            "tokens": outcome.tokens,
            "forwards": outcome.forwards,
            "complete": outcome.complete,
        },
    }
