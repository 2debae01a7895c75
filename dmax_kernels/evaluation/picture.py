"""The picture: accuracy against tokens per forward pass, one line per model and rule."""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from dmax_kernels.evaluation.metrics import share_interval
from dmax_kernels.evaluation.report import Report
from dmax_kernels.files import write_atomically

MARKERS = "osD^v*PX<>"


def write_picture(report: Report, path: Path) -> None:
    """One panel per measure, with intervals of 95 %; a PNG."""
    measures = report.measures
    figure = Figure(figsize=(7 * len(measures) + 2, 5), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(measures), squeeze=False)[0]
    for axes, measure in zip(panels, measures, strict=True):
        for number, ((model, rule), cells) in enumerate(report.series().items()):
            rows = [(cell.tau_dec, report.rows[cell]) for cell in cells]
            rows.sort(key=lambda row: row[1].tokens_per_forward())
            x = [outcome.tokens_per_forward() for _, outcome in rows]
            y = [100 * outcome.share(measure) for _, outcome in rows]
            bounds = [share_interval(sum(o.right[measure]), o.problems) for _, o in rows]
            errors = [
                [share - 100 * low for share, (low, _) in zip(y, bounds, strict=True)],
                [100 * high - share for share, (_, high) in zip(y, bounds, strict=True)],
            ]
            marker = MARKERS[number % len(MARKERS)]
            axes.errorbar(x, y, errors, marker=marker, capsize=2, lw=1.4, label=f"{model}, {rule}")
            for (tau, _), point_x, point_y in zip(rows, x, y, strict=True):
                offset = (6, 5)
                axes.annotate(
                    f"τ {tau:g}", (point_x, point_y), offset, textcoords="offset points", fontsize=7
                )
        axes.set(xlabel="tokens per forward pass", ylabel=f"{measure}, % right", ylim=(-4, 108))
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[-1].legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8)
    write_atomically(path, lambda file: figure.savefig(file, format="png"))
