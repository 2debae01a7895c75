"""Files of a run: each is written whole, beside what it replaces, and then renamed."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as distributed_checkpoint
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from dmax_kernels.files import replace_folder, save_json
from dmax_kernels.training.parallel import Processes

STATE = "training_state"  # folder inside a checkpoint: shards of tensors, and run.json


class CheckpointNotWritten(OSError):
    """A checkpoint could not be written; those before it are as they were."""


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
        """Oldest first. A folder of the user's own, as "step-00000100-best", is none of them."""
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
                save_json(temporary / STATE / "run.json", run)
                replace_folder(temporary, path)  # one is there if the run went on from an older one

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
