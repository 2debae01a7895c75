"""What a run leaves to look at: a line of JSON per step, a progress bar, a picture of the loss."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import Any

import torch

from dmax_kernels.files import write_atomically

PASSES = ("loss_masked", "loss_predicted")


class Metrics:
    """`metrics.jsonl`: one object per step, appended. A resumed run drops what came after it."""

    def __init__(self, folder: Path, first_step: int) -> None:
        self.path, self.picture = folder / "metrics.jsonl", folder / "loss.png"
        self.rows: list[dict[str, Any]] = []
        if self.path.exists():
            for line in self.path.read_text().splitlines():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:  # cut short when the run was killed
                    break
                if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                    raise ValueError(
                        f"--output must be a folder of a run or a new one, got {folder}, where "
                        f"{self.path.name} is not this command's and would be overwritten"
                    )
                if row["step"] < first_step:
                    self.rows.append(row)
        text = "".join(json.dumps(row) + "\n" for row in self.rows)
        write_atomically(self.path, lambda file: file.write_text(text))

    def add(self, row: dict[str, Any]) -> None:
        # JSON has no NaN
        row = {k: repr(v) if isinstance(v, float) and v - v != 0 else v for k, v in row.items()}
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def draw(self) -> None:
        """`loss.png`: the loss of each pass per token, over the steps."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 4.5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        for name, label in zip(PASSES, ("masked pass", "predicted pass"), strict=True):
            points = [(row["step"], row[name]) for row in self.rows if row.get(name) is not None]
            if points:
                steps, losses = zip(*points, strict=True)
                (line,) = axes.plot(steps, losses, lw=0.6, alpha=0.35)
                axes.plot(steps, smooth(losses), color=line.get_color(), label=label)
        axes.set(xlabel="step", ylabel="cross-entropy per token (nats)")
        axes.grid(alpha=0.3)
        axes.legend()
        write_atomically(self.picture, lambda file: figure.savefig(file, format="png", dpi=130))


def smooth(values: tuple[float, ...], weight: float = 0.95) -> list[float]:
    """Exponential mean, corrected for its start."""
    mean, total, out = 0.0, 0.0, []
    for value in values:
        mean, total = weight * mean + (1 - weight) * value, weight * total + (1 - weight)
        out.append(mean / total)
    return out


def peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU's allocator, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
