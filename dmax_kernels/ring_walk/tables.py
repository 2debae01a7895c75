"""The demo's tables: the paper's Tables 1 to 4, and what these leave out.

Every share has beside it how it differs from the table's row of reference on the same problems, in
points, with an interval of 95 % (`evaluation.metrics.paired`).
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from dmax_kernels.evaluation.cells import Cell, Outcome
from dmax_kernels.evaluation.metrics import paired
from dmax_kernels.ring_walk import claims, judging
from dmax_kernels.ring_walk.evaluate import CRITERIA, MEASURES, TAUS
from dmax_kernels.ring_walk.ladder import SEEDS, Arm

Outcomes = Mapping[Cell, Outcome]
LABEL = 36
VERDICT_SIGNS = {judging.HOLDS: "+", judging.FAILS: "-", judging.UNDECIDED: "."}
# Table 1's five methods, and the claims' two other series, by (model, rule): label and tau
METHOD_ROWS = {
    ("base", "threshold"): ("base, threshold 0.95", claims.BASE),
    ("base", "hierarchical"): ("base, hierarchical 0.95 / 0.2", claims.HIERARCHICAL),
    ("certainty", "threshold"): ("certainty forcing, threshold 0.95", claims.CERTAINTY),
    ("uniform", "uniform"): ("uniform training, its own decoding", claims.UNIFORM),
    ("oput", "spd"): ("DMax: OPUT, SPD 0.5", claims.DMAX),
}
LEFT_OUT = {
    ("control", "threshold"): ("control, threshold 0.95", Cell("control", "threshold", 0.95)),
    ("oput", "threshold"): ("OPUT, threshold 0.95", Cell("oput", "threshold", 0.95)),
    ("uniform", "spd"): ("uniform training, SPD 0.5", Cell("uniform", "spd", 0.5)),
}
# Table 3's rows: (rollout, prefix, hybrid), model and rule
ABLATION = (
    ("- - -", "base", "threshold"),
    ("- x x", "base", "spd"),
    ("x - -", "oput", "hard"),
    ("x x -", "oput", "hard_prefix"),
    ("x - x", "oput", "hybrid"),
    ("x x x", "oput", "spd"),
)
NOTES = (
    "SPD ends blocks by the default, settled rule; the paper's own ends them earlier where tau_dec "
    "is near 1 (docs/semantics.md). A block that does not converge ends after 32 passes. The paper "
    "has no such cap, which decides the passes of Table 4's confidence and of the collapsed rows."
)
DECODERS = {
    "threshold": "threshold",
    "hard": "hard tokens",
    "hard_prefix": "hard tokens, prefix",
    "hybrid": "hybrid",
    "spd": "hybrid, prefix (SPD)",
}


def heading(first: str, more: str = "") -> str:
    shares = " | ".join(f"{measure:>6}  {'less reference':<20}" for measure in MEASURES)
    line = f"{first:<{LABEL}} |   t/f   f/b | {shares}{more}"
    return f"{line}\n{'-' * len(line)}"


def row(label: str, outcome: Outcome, reference: Outcome) -> str:
    """A table's line: rates, and both shares with their differences from the reference."""
    mark = "*" if outcome.collapsed else " "
    shares = []
    for measure in MEASURES:
        text = f"{100 * outcome.share(measure):6.1f}{mark} "
        if outcome is reference:
            shares.append(text + f"{'reference':<20}")
            continue
        change = paired(outcome.right[measure], reference.right[measure])
        value, low, high = (100 * v for v in (change.difference, change.low, change.high))
        shares.append(text + f"{f'{value:+.1f} [{low:+.1f}, {high:+.1f}]':<20}")
    rate = f"{outcome.tokens_per_forward(count_eos=False):5.2f} {outcome.forwards_per_block:5.2f}"
    return f"{label:<{LABEL}} | {rate} | " + " | ".join(shares)


def table1(outcomes: Outcomes) -> str:
    """Five methods by tokens per forward pass and per second, accuracy, and AUP."""
    areas = {measure: judging.drawn_areas(outcomes, measure) for measure in MEASURES}
    lines = [heading("Table 1", " |  tok/s | AUP answer strict")]
    for rows in (METHOD_ROWS, LEFT_OUT):
        if rows is LEFT_OUT:
            lines.append("what the paper's table leaves out:")
        for series, (label, cell) in rows.items():
            outcome = outcomes[cell]
            aups = "".join(f"{areas[measure][series][0]:7.0f}" for measure in MEASURES)
            text = row(label, outcome, outcomes[claims.BASE])
            lines.append(f"{text} | {outcome.tokens_per_second:6.0f} |    {aups}")
    return "\n".join(lines)


def table2(outcomes: Outcomes) -> str:
    """Low parallelism: the base, and DMax at the threshold 0.95."""
    base = outcomes[claims.BASE]
    lines = [heading("Table 2"), row("base, threshold 0.95", base, base)]
    return "\n".join(
        [*lines, row("DMax: OPUT, SPD 0.95", outcomes[claims.oput("spd", 0.95)], base)]
    )


def table3(outcomes: Outcomes) -> str:
    """Six rows at three thresholds; the reference is OPUT with hard tokens, without a prefix."""
    lines = [heading("Table 3 (rollout, prefix, hybrid)")]
    for tau in TAUS:
        lines.append(f"tau_dec {tau:g}")
        reference = outcomes[claims.oput("hard", tau)]
        for signs, model, rule in ABLATION:
            name = "base" if model == "base" else "OPUT"
            label = f"  {signs}  {name}, {DECODERS[rule]}"
            lines.append(row(label, outcomes[Cell(model, rule, tau)], reference))
    return "\n".join(lines)


def table4(outcomes: Outcomes) -> str:
    """The convergence criteria of OPUT with SPD at 0.5."""
    both = outcomes[claims.DMAX]
    lines = [heading("Table 4: a block converges by")]
    for criterion in CRITERIA:
        lines.append(row(criterion, outcomes[Cell("oput", "spd", 0.5, criterion)], both))
    return "\n".join(lines)


def all_tables(outcomes: Outcomes) -> str:
    tables = [table(outcomes) for table in (table1, table2, table3, table4)]
    tables.append(textwrap.fill(NOTES, 100))
    collapsed = [outcome.problems for outcome in outcomes.values() if outcome.collapsed]
    if collapsed:
        tables.append(
            f"* collapsed: no derivation right in the first {max(collapsed)} problems, most passes "
            "in vain; not decoded further, and compared on those"
        )
    return "\n\n".join(tables)


def findings(outcomes: Outcomes) -> str:
    """Each claim with its verdict by each measure, and the figures that decide."""
    lines = []
    judged = [claims.judge_all(outcomes, measure) for measure in MEASURES]
    for number, pair in enumerate(zip(*judged, strict=True), 1):
        claim = pair[0][0]
        lines.append(f"{number:>2}. {claim.where}: {claim.text}.")
        by_measure = list(zip(MEASURES, pair, strict=True))
        if pair[0] == pair[1]:  # tokens per forward pass are not a matter of the measure
            by_measure = [("both", pair[0])]
        for measure, (_, verdict, tests) in by_measure:
            figures = "; ".join(map(str, tests))
            word = verdict.upper() if verdict == judging.FAILS else verdict
            line = f"      {measure} {word}: {figures}"
            lines.append(textwrap.fill(line, 100, subsequent_indent="        "))
    return "\n".join(lines)


def ladder_columns(record: dict[str, Any]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """(heading, what was judged by each measure) of every training of OPUT in the record."""
    trainings = dict.fromkeys((j["rollout"], j["steps"], j["seed"]) for j in record["judged"])
    for rollout, steps, seed in sorted(trainings, key=lambda t: (t[0] == "drawn", t[1], t[2])):
        mark = "abc"[SEEDS.index(seed)] + ("d" if rollout == "drawn" else "")
        yield (
            f"{steps}{mark}",
            [
                next(
                    each
                    for each in record["judged"]
                    if (each["rollout"], each["steps"], each["seed"], each["measure"])
                    == (rollout, steps, seed, measure)
                )
                for measure in MEASURES
            ],
        )


def ladder_table(record: dict[str, Any]) -> str:
    """Every claim at every length: answer / strict; + holds, - fails, . undecided."""
    columns = list(ladder_columns(record))
    line = f"{'claim':<5}" + "".join(f"{name:>6}" for name, _ in columns)
    lines = [line, "-" * len(line)]
    for number in range(len(claims.CLAIMS)):
        cells = (
            "/".join(VERDICT_SIGNS[each["claims"][number]["verdict"]] for each in by_measure)
            for _, by_measure in columns
        )
        lines.append(f"{number + 1:>3}. " + "".join(f"{cell:>6}" for cell in cells))
    return "\n".join(lines)


def setting(steps: int) -> str:
    """How the models were trained, for the tables' heading."""
    config = Arm("oput", steps).stage().config
    rollout = "greedy" if config.rollout_temperature == 0 else "drawn"
    return (
        f"All but the base were trained for {steps} steps of {config.batch_size} of the base's own "
        f"responses (4,608, threshold 0.95) by {config.optimizer.capitalize()} (peak "
        f"{config.muon_learning_rate:g}; AdamW {config.learning_rate:g} for embedding and head, "
        f"linear fall to 0), OPUT with a {rollout} rollout and both passes in each step. The "
        "paper: AdamW, 2e-6, batch 8, 2 epochs, a drawn rollout, passes in turn."
    )
