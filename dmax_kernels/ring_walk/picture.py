"""The picture of the ladder: where in the training each of the paper's effects lives."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dmax_kernels.files import write_atomically
from dmax_kernels.ring_walk.claims import CLAIMS
from dmax_kernels.ring_walk.evaluate import MEASURES

# A line of the upper panels: its label, and the claim whose first figure it shows
EFFECTS = {
    "hybrid over hard tokens, τ 0": "Hybrid embeddings improve on hard tokens at 0",
    "hybrid over hard tokens, τ 0.5": "Hybrid embeddings improve on hard tokens at 0.5",
    "prefix (hybrid), τ 0.5": "A contiguous prefix improves hybrid embeddings at 0.5",
    "prefix (hard tokens), τ 0.5": "A contiguous prefix improves hard tokens at 0.5",
    "Table 2: SPD 0.95 over the base": (
        "At low parallelism (tau 0.95) DMax is more accurate than the base"
    ),
}
AREAS = {
    "oput spd": "DMax (SPD)",
    "certainty threshold": "certainty forcing",
    "control threshold": "control",
    "oput threshold": "OPUT, plain threshold",
    "uniform uniform": "uniform, its own decoding",
    "uniform spd": "uniform, SPD",
    "base hierarchical": "base, hierarchical",
    "base threshold": "base",
}
SPREAD = 0.025  # of the step count, between lines, so that their intervals do not overlap


def write_ladder(record: dict[str, Any], path: Path) -> None:
    """Two panels of effects in points and two of AUP, over the steps of training; a PNG."""
    figure = Figure(figsize=(13, 9), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 2)
    for column, measure in enumerate(MEASURES):
        judged = [
            each
            for each in record["judged"]
            if each["measure"] == measure and each["rollout"] == "greedy"
        ]
        draw_effects(panels[0, column], judged)
        draw_areas(panels[1, column], judged)
        panels[0, column].set_title(f'by "{measure}"')
    panels[0, 0].set_ylabel("points more, on the same problems")
    panels[1, 0].set_ylabel("AUP")
    steps = sorted({each["steps"] for each in record["judged"]})
    for axes in panels.flat:
        axes.set_xscale("log")
        axes.set_xticks(steps, labels=map(str, steps))
        axes.minorticks_off()
        axes.set_xlabel("steps of training; a point for each seed")
        axes.grid(alpha=0.3)
    for axes in panels[:, 1]:
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8)
    write_atomically(path, lambda file: figure.savefig(file, format="png"))


def draw_effects(axes: Any, judged: list[dict[str, Any]]) -> None:
    axes.axhline(0, color="black", lw=0.8)
    for number, (label, claim) in enumerate(EFFECTS.items()):
        points = [(each["steps"], each["claims"][number_of(claim)]["tests"][0]) for each in judged]
        x = [steps * (1 + SPREAD * (number - 2)) for steps, _ in points]
        y = [test["value"] for _, test in points]
        errors = [
            [max(0.0, test["value"] - test["low"]) for _, test in points],
            [max(0.0, test["high"] - test["value"]) for _, test in points],
        ]
        colour = f"C{number}"
        axes.errorbar(x, y, errors, fmt="o", ms=4, capsize=2, lw=1, color=colour, label=label)
        axes.plot(*zip(*means(zip(x, y, strict=True)), strict=True), color=colour, lw=1.2)


def draw_areas(axes: Any, judged: list[dict[str, Any]]) -> None:
    for number, (series, label) in enumerate(AREAS.items()):
        points = [(each["steps"], each["aup"][series]) for each in judged if series in each["aup"]]
        if points:
            axes.plot(*zip(*points, strict=True), "o", ms=4, color=f"C{number}", label=label)
            axes.plot(*zip(*means(points), strict=True), color=f"C{number}", lw=1.2)


def number_of(claim: str) -> int:
    return next(i for i, each in enumerate(CLAIMS) if each.text == claim)


def means(points: Any) -> Iterator[tuple[float, float]]:
    """Points as the means of those with the same x."""
    by_x: dict[float, list[float]] = {}
    for x, y in points:
        by_x.setdefault(x, []).append(y)
    for x in sorted(by_x):
        yield x, sum(by_x[x]) / len(by_x[x])
