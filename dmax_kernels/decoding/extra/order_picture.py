"""The order of a decoding as a picture: position against step (arXiv 2602.23225, Figure 1)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dmax_kernels._checks import require
from dmax_kernels.decoding.extra.arness import commit_steps, fair_arness
from dmax_kernels.decoding.trace import Trace
from dmax_kernels.files import write_atomically


def write_order_picture(
    traces: Mapping[str, Trace | Mapping[str, Any]],
    path: str | Path,
    *,
    row: int = 0,
    end: int | None = None,
) -> None:
    """One panel per trace: a dot at (step, position) for each position that left the mask.

    A diagonal is left-to-right decoding, a cloud is a random order, and several diagonals are
    several paths at once. Steps are the denoising passes of the row, counted over its blocks;
    positions are counted from the first that was decoded. A panel's title has its name and its
    Global-ARness@1, with the commits of one step counted in any order (`fair_arness`). The file is
    a PNG.

    Args:
        traces: by the panels' names, `Trace`s or what their `to_dict` returned.
        path: where the picture goes.
        row: which row of each trace.
        end: leave out this position of the sequence and later ones.

    Raises:
        ValueError: no trace, or a trace without that row.
    """
    require(len(traces) > 0, "write_order_picture: traces", "at least one trace", "none")
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # decoding itself needs none of it
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 * len(traces), 3.6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(traces), squeeze=False)[0]
    for axes, (name, trace) in zip(panels, traces.items(), strict=True):
        rows = (trace.to_dict() if isinstance(trace, Trace) else trace)["rows"]
        need = f"a row of the trace {name!r}, which has {len(rows)}"
        require(0 <= row < len(rows), "write_order_picture: row", need, row)
        steps = commit_steps(rows[row], end)
        points = [(i, position) for i, step in enumerate(steps, 1) for position in step]
        first = min((position for _, position in points), default=0)
        axes.scatter([i for i, _ in points], [p - first for _, p in points], s=7, linewidths=0)
        axes.set_title(f"{name}\nARness {fair_arness(steps):.2f}", fontsize=10)
        axes.set(xlabel="step", ylabel="position")
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    write_atomically(Path(path), lambda file: figure.savefig(file, format="png"))
