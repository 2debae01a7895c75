"""Files of a run: each is written whole, beside what it replaces, and then renamed."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as distributed_checkpoint
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from dmax_kernels.training.parallel import Processes

STATE = "training_state"  # folder inside a checkpoint: shards of tensors, and run.json


class CheckpointNotWritten(OSError):
    """A checkpoint could not be written; those before it are as they were."""


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Writes a temporary file beside `path`, then renames it: an interruption leaves no half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_json(path: Path, value: Any) -> None:
    write_atomically(path, lambda file: file.write_text(json.dumps(value, indent=1) + "\n"))


class Checkpoints:
    """The folders `step-00000100`, ... of a run. A folder of that name is complete.

    Each is a Hugging Face folder (config, safetensors, tokenizer) that also holds what a run
    resumes from.
    """

    def __init__(self, folder: Path, keep: int, group: Processes) -> None:
        self.folder = folder
        self.keep = keep
        self.group = group
        if group.is_first:
            for left in folder.glob(".step-*.tmp"):  # of a process that was killed
                shutil.rmtree(left)

    def all(self) -> list[Path]:
        """Oldest first."""
        return sorted(self.folder.glob("step-*"))

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
            run: what else to resume from, as JSON.
            write_model: writes the model's own files into a folder; called by every process.

        Raises:
            CheckpointNotWritten: on every process, whichever of them failed.
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
                (temporary / STATE / "run.json").write_text(json.dumps(run, indent=1) + "\n")
                shutil.rmtree(path, ignore_errors=True)  # of a run that went on from an older one
                temporary.rename(path)

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
        """What went wrong, on this process or another: after it, all go the same way.

        A process alone in its error would leave the others waiting in their next collective.
        """
        problem = None
        try:
            action()
        except (Exception, CheckpointException) as error:
            problem = reason(error)
        failed = self.group.sum([float(problem is not None)])[0] > 0
        return problem or ("another process failed" if failed else None)


def read_run(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / STATE / "run.json").read_text())


def load_state(checkpoint: Path, state: dict[str, Tensor]) -> None:
    """Reads into the tensors of `state`. Every process calls it."""
    try:
        with quiet():
            distributed_checkpoint.load(state, checkpoint_id=checkpoint / STATE)
    except (Exception, CheckpointException) as error:
        raise ValueError(
            f"{checkpoint} must be a checkpoint of this model ({reason(error)})"
        ) from error


def quiet() -> warnings.catch_warnings:
    """One process needs no process group, which the library warns about at each call."""
    return warnings.catch_warnings(action="ignore", category=UserWarning)


def reason(error: BaseException) -> str:
    """One line: an exception that carries those of several processes says the first."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return f"{type(error).__name__}: {error}".splitlines()[0]
