"""What a run writes: checkpoints to resume from, metrics.jsonl and loss.png."""

from __future__ import annotations

import json
import resource
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as distributed_checkpoint
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.optim import AdamW, Optimizer

from dmax_kernels.files import read_json, replace_folder, save_json, write_atomically
from dmax_kernels.training.parallel import Processes

STATE = "training_state"  # the folder in a checkpoint that holds tensor shards and run.json


class CheckpointNotWritten(OSError):
    """A checkpoint could not be written; earlier ones are untouched."""


class Checkpoints:
    """The folders `step-00000100`, ... of a run: Hugging Face folders with a resume state inside.

    A folder of such a name is complete: it is written under a different name and then renamed.
    """

    def __init__(self, folder: Path, keep: int, group: Processes) -> None:
        self.folder = folder
        self.keep = keep
        self.group = group
        if group.is_first:
            for unfinished in folder.glob(".step-*.tmp"):  # a process was killed
                shutil.rmtree(unfinished)

    def all(self) -> list[Path]:
        """Oldest first, without folders of the user's own, such as "step-00000100-best"."""
        return sorted(self.folder.glob("step-" + "[0-9]" * 8))

    def newest(self) -> Path | None:
        return self.all()[-1] if self.all() else None

    def save(
        self,
        step: int,
        state: dict[str, Tensor],
        run: dict[str, Any],
        write_model: Callable[[Path], None],
    ) -> Path:
        """Writes a checkpoint and deletes the oldest beyond `keep`. Every process calls it.

        Args:
            run: what else a run resumes from, as JSON values.
            write_model: writes the model's own files into a folder; called by every process.

        Raises:
            CheckpointNotWritten: on every process, no matter which of them failed.
        """
        path, temporary = self.folder / f"step-{step:08d}", self.folder / f".step-{step:08d}.tmp"

        def make_folder() -> None:
            if self.group.is_first:
                shutil.rmtree(temporary, ignore_errors=True)
                (temporary / STATE).mkdir(parents=True)

        def write_state() -> None:
            with quiet():
                distributed_checkpoint.save(state, checkpoint_id=temporary / STATE)

        def rename() -> None:
            if self.group.is_first:
                save_json(temporary / STATE / "run.json", run)
                # `path` exists if the run was resumed from an older checkpoint
                replace_folder(temporary, path)

        for action in (make_folder, lambda: write_model(temporary), write_state, rename):
            problem = self.attempt(action)
            if problem is not None:
                if self.group.is_first:
                    shutil.rmtree(temporary, ignore_errors=True)
                raise CheckpointNotWritten(
                    f"the checkpoint of step {step} could not be written to {self.folder} "
                    f"({problem}); the last good one is {self.newest() or 'not there yet'}"
                )
        if self.group.is_first:
            for old in self.all()[: -self.keep] if self.keep else []:
                shutil.rmtree(old)
        return path

    def attempt(self, action: Callable[[], None]) -> str | None:
        """What went wrong, on this process or on another: all of them learn of it and stop.

        A process that stopped alone would leave the others waiting in their next collective.
        """
        problem = None
        try:
            action()
        except (Exception, CheckpointException) as error:
            problem = reason(error)
        failed = self.group.sum([float(problem is not None)])[0] > 0
        return problem or ("another process failed" if failed else None)


def read_run(checkpoint: Path) -> dict[str, Any]:
    return read_json(checkpoint / STATE / "run.json", "the checkpoint's record")


def load_state(checkpoint: Path, state: dict[str, Tensor]) -> None:
    """Reads into the tensors of `state`. Every process calls it."""
    try:
        with quiet():
            distributed_checkpoint.load(state, checkpoint_id=checkpoint / STATE)
    except (Exception, CheckpointException) as error:
        raise ValueError(
            f"{checkpoint} must be a checkpoint of this model ({reason(error)})"
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Silences the warning, at each call, that a single process has no process group."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def reason(error: BaseException) -> str:
    """One line; of an exception that carries those of several processes, the first."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return f"{type(error).__name__}: {error}".splitlines()[0]


def training_state(
    parameters: Mapping[str, nn.Parameter], optimizers: list[Optimizer]
) -> dict[str, Tensor]:
    """References to every tensor that a step changes: the weights and the optimizers' moments.

    A checkpoint is written from them and read into them. Generators have no state to keep, because
    every step seeds them from its own number. Sharded tensors (DTensor) stay sharded: each process
    writes its own part, and a run may be resumed with a different number of processes.
    """
    state = {f"weight.{name}": parameter.detach() for name, parameter in parameters.items()}
    names = {id(parameter): name for name, parameter in parameters.items()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                for key, value in moments(optimizer, parameter).items():
                    state[f"optimizer.{names[id(parameter)]}.{key}"] = value
    return state


def moments(optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """The optimizer's state of a parameter; zeros are made before the first step makes it."""
    state = optimizer.state[parameter]
    if not state:
        if isinstance(optimizer, AdamW):
            state["step"] = torch.zeros((), dtype=torch.float32)
            keys = ("exp_avg", "exp_avg_sq")
        else:
            keys = ("momentum",)
        for key in keys:
            state[key] = torch.zeros_like(parameter).detach()
    return state


# In the order and with the names in which the picture shows them
LOSS_LABELS = {
    "loss_masked": "masked pass",
    "loss_predicted": "predicted pass",
    "loss_uniform": "uniform pass",
    "loss_certainty": "certainty",
}


def losses_of(row: dict[str, Any]) -> list[str]:
    """The names of the losses that a step's row of metrics has."""
    return [name for name in LOSS_LABELS if row.get(name) is not None]


class Metrics:
    """`metrics.jsonl`: one object per step. A resumed run drops the steps that it repeats."""

    def __init__(self, folder: Path, first_step: int) -> None:
        self.path, self.picture = folder / "metrics.jsonl", folder / "loss.png"
        self.rows: list[dict[str, Any]] = []
        if self.path.exists():
            for line in self.path.read_text().splitlines():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:  # the line was cut short when the run was killed
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
        # JSON has neither NaN nor infinity
        row = {k: repr(v) if isinstance(v, float) and v - v != 0 else v for k, v in row.items()}
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def draw(self) -> None:
        """`loss.png`: each loss per token, over the steps."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 4.5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        for name, label in LOSS_LABELS.items():
            points = [(row["step"], row[name]) for row in self.rows if row.get(name) is not None]
            if points:
                steps, losses = zip(*points, strict=True)
                (line,) = axes.plot(steps, losses, lw=0.6, alpha=0.35)
                axes.plot(steps, smooth(losses), color=line.get_color(), label=label)
        axes.set(xlabel="step", ylabel="loss per token (nats)")
        axes.grid(alpha=0.3)
        axes.legend()
        write_atomically(self.picture, lambda file: figure.savefig(file, format="png", dpi=130))


def smooth(values: tuple[float, ...], weight: float = 0.95) -> list[float]:
    """The exponential moving average, corrected for its start at 0."""
    mean, total, out = 0.0, 0.0, []
    for value in values:
        mean, total = weight * mean + (1 - weight) * value, weight * total + (1 - weight)
        out.append(mean / total)
    return out


def peak_memory(device: torch.device) -> int:
    """The most bytes that were in use, by the GPU's allocator or by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
