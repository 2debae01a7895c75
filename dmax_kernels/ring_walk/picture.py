"""The picture: derivations right against tokens per forward pass."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # draws to a file, with or without a display

from matplotlib import pyplot as plt
from matplotlib.lines import Line2D

from dmax_kernels.files import write_atomically
from dmax_kernels.ring_walk.evaluate import TAUS, Cell, Result, ablation_rows
from dmax_kernels.ring_walk.tables import MODEL_NAMES, RULE_NAMES, best_control

COLOURS = {"base": "#6b7280", "oput": "#d9480f", "control": "#1c7ed6"}
LINES = {"threshold": "-", "hard": ":", "hard_prefix": "-.", "hybrid": "--", "spd": "-"}
MARKERS = {"threshold": "o", "hard": "s", "hard_prefix": "v", "hybrid": "D", "spd": "*"}
# (model, rule): a label's offset from its marker in points, and its alignment
LABELS = {
    ("oput", "spd"): ((9, 2), "left"),
    ("control", "threshold"): ((0, -15), "center"),
    ("base", "threshold"): ((0, 9), "center"),
}


def write_picture(results: dict[Cell, Result], problems: int, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(10, 5.6), dpi=150, layout="constrained")
    handles = []
    for model, rule in ablation_rows():
        taus = sorted(
            (cell.tau_dec for cell in results if is_plain(cell, model, rule)), reverse=True
        )
        cells = [results[Cell(model, rule, tau)] for tau in taus]
        style = {
            "color": COLOURS[model],
            "linestyle": LINES[rule],
            "marker": MARKERS[rule],
            "markersize": 13 if rule == "spd" else 6,
            "linewidth": 2.2 if rule == "spd" else 1.3,
            "markeredgecolor": "white",
            "markeredgewidth": 0.6,
            "zorder": 3 if rule == "spd" else 2,
        }
        x = [cell.tokens_per_forward for cell in cells]
        y = [100 * cell.strict for cell in cells]
        axes.plot(x, y, **style)
        handles.append(Line2D([], [], label=f"{MODEL_NAMES[model]}, {RULE_NAMES[rule]}", **style))
        # Label the thresholds of the rows that the text is about
        for tau, cell_x, cell_y in zip(taus, x, y, strict=True):
            if (model, rule) in LABELS and tau in (*TAUS, best_control(results)[0]):
                offset, align = LABELS[model, rule]
                if (model, tau) == ("oput", 0.5):  # the point of tau 0 lies just above
                    offset = (9, -11)
                elif (model, tau) == ("oput", 0.95):  # the other rules lie to its right
                    offset, align = (-9, -3), "right"
                axes.annotate(
                    f"τ {tau:g}",
                    (cell_x, cell_y),
                    offset,
                    textcoords="offset points",
                    ha=align,
                    fontsize=8,
                    color=COLOURS[model],
                )
    axes.set_xscale("log")
    ticks = (0.25, 0.5, 1, 2, 4, 8, 16, 32)
    axes.set_xticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlim(0.2, 40)
    axes.set_ylim(-4, 108)
    axes.set_xlabel("tokens per forward pass")
    axes.set_ylabel("whole derivations right, %")
    axes.set_title(
        f"Accuracy against decoding parallelism: {problems} held-out problems, "
        "τ_dec falling along each line",
        fontsize=11,
    )
    axes.grid(color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(
        handles=handles, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8.5
    )
    write_atomically(path, lambda file: figure.savefig(file, format="png"))
    plt.close(figure)


def is_plain(cell: Cell, model: str, rule: str) -> bool:
    return (cell.model, cell.rule, cell.convergence) == (model, rule, "both")
