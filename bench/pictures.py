"""Pictures of the records of bench/run.py (speed-ups, roofline, how cost grows) and memory.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

OURS, OTHER, TARGET = "#1b7f79", "#9aa5b1", "#d1495b"


def draw(record: dict, stem: Path) -> Iterator[Path]:
    """Writes ``<stem>-speedup.png``, ``-roofline.png`` and, where measured, ``-scaling.png``."""
    figures = {"speedup": speedups, "roofline": roofline}
    if record.get("scaling"):
        figures["scaling"] = scaling
    for name, make in figures.items():
        figure = make(record)
        figure.text(0.01, -0.02, caption(record["machine"]), fontsize=7, color="#667")
        path = stem.with_name(f"{stem.name}-{name}.png")
        figure.savefig(path, dpi=130, bbox_inches="tight")
        plt.close(figure)
        yield path


def caption(machine: dict) -> str:
    device = machine["GPU"] if machine["GPU"] != "none" else machine["CPU"]
    return f"{device}, torch {machine['torch']}, commit {machine['commit']}"


def measured(record: dict) -> list[dict]:
    """From the bottom up; where a cell was run at several numbers of CPU threads, the largest."""
    rows = [row for row in record["results"] if "failed" not in row]
    rows = [row for row in rows if "speed-up" in row["candidates"]["fused"]]
    most = max((row.get("threads", 0) for row in rows), default=0)
    return [row for row in rows if row.get("threads", 0) == most][::-1]


def speedups(record: dict):
    """Ours over eager, one bar per case; red where the design sets a target, a dot at the best
    peer."""
    rows = measured(record)
    figure, axes = plt.subplots(figsize=(9, 0.22 * len(rows) + 0.8))
    values = [row["candidates"]["fused"]["speed-up"] for row in rows]
    axes.barh(range(len(rows)), values, color=OURS, height=0.7)
    for index, (row, value) in enumerate(zip(rows, values, strict=True)):
        axes.text(value * 1.03, index, f"{value:.1f}", va="center", fontsize=7)
        if target := row["targets"].get("speed-up"):
            axes.plot([target, target], [index - 0.4, index + 0.4], color=TARGET, lw=2)
        if peer := row["candidates"].get(row.get("best peer", "torch.compile")):
            axes.plot(peer["speed-up"], index, "o", color="black", ms=4)
    axes.set_yticks(range(len(rows)), [row["case"] for row in rows], fontsize=7)
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.set_xscale("log")
    axes.axvline(1, color="black", lw=0.8)
    axes.set_xlabel("speed-up over eager PyTorch (red: target; dot: the best peer)")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def roofline(record: dict):
    """How much of the time the bytes alone would take: ours, one bar per case that moves real
    bytes."""
    rows = [row for row in measured(record) if row["bytes"] >= 1 << 20]
    figure, axes = plt.subplots(figsize=(9, 0.22 * len(rows) + 0.8))
    for index, row in enumerate(rows):
        floor = max(row["share of bandwidth"], row.get("share of matrix rate", 0))
        bound = "matrix rate" if floor == row.get("share of matrix rate") else "bandwidth"
        axes.barh(index, floor, color=OURS if bound == "bandwidth" else OTHER, height=0.7)
        axes.text(floor + 0.01, index, f"{floor:.0%} of {bound}", va="center", fontsize=7)
        if target := row["targets"].get("share of bandwidth"):
            axes.plot([target, target], [index - 0.4, index + 0.4], color=TARGET, lw=2)
    axes.set_yticks(range(len(rows)), [row["case"] for row in rows], fontsize=7)
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.axvline(1, color="black", lw=0.8)
    longest = max(patch.get_width() for patch in axes.patches)
    axes.set_xlim(0, max(1.25, 1.25 * longest))
    axes.set_xlabel("share of the nearer roof, measured in the same run (red: target)")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def scaling(record: dict):
    series = record["scaling"]
    figure, grid = plt.subplots(1, len(series), figsize=(3.4 * len(series), 3), squeeze=False)
    for axes, each in zip(grid[0], series, strict=True):
        sizes = [point[each["axis"]] for point in each["points"]]
        for name, color in (("eager", OTHER), ("fused", OURS)):
            times = [point[name] / 1e3 for point in each["points"]]
            axes.plot(sizes, times, "o-", color=color, label=name, ms=4)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(sizes, [str(size) for size in sizes], fontsize=7)
        axes.minorticks_off()
        axes.set_xlabel(each["axis"])
        axes.set_title(each["op"], fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    grid[0][0].set_ylabel("milliseconds")
    grid[0][0].legend(frameon=False, fontsize=8)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    return figure


def draw_memory(record: dict, path: Path) -> None:
    """Peak bytes of each way that bench/memory.py measured, one group of bars per number of
    rows."""
    colors = {"eager": OTHER, "alternating": "#c8d0d8", "fused": OURS}
    figure, axes = plt.subplots(figsize=(7, 3.5))
    rows = sorted({entry["rows"] for entry in record["memory"]})
    for offset, way in enumerate(colors):
        values = [e["bytes"] / 1e6 for e in record["memory"] if e["way"] == way]
        places = [i + (offset - 1) * 0.27 for i in range(len(rows))]
        axes.bar(places, values, width=0.25, color=colors[way], label=way)
        for place, value in zip(places, values, strict=True):
            axes.text(place, value * 1.05, f"{value:.0f}", ha="center", fontsize=7)
    for i, n in enumerate(rows):
        floor = next(e["gradients"] for e in record["memory"] if e["rows"] == n) / 1e6
        axes.plot([i - 0.4, i + 0.4], [floor, floor], color=TARGET, lw=1.5)
    axes.set_yscale("log")
    axes.set_xticks(range(len(rows)), [f"{n} positions" for n in rows])
    axes.set_ylabel("MB on top of the inputs (red: gradients alone)", fontsize=8)
    sizes = record["sizes"]
    axes.set_title(
        f"OPUT loss, forward and backward: V = {sizes['vocab']}, D = {sizes['dim']}, "
        f"{sizes['dtype']}", fontsize=9,
    )  # fmt: skip
    figure.text(0.01, 0.005, caption(record["machine"]), fontsize=7, color="#667")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)
