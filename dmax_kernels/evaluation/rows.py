"""Finished rows of an evaluation in a folder, from which an interrupted one goes on."""

from __future__ import annotations

import json
import re
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dmax_kernels.evaluation.cells import Cell, Outcome
from dmax_kernels.files import read_json, save_json
from dmax_kernels.models.prompt_file import Prompt, fingerprint
from dmax_kernels.training.config import check_same_run


class Rows:
    """One file per row, written when the row is finished.

    Args:
        folder: made with the first row; None keeps nothing.
        settings: what all rows have in common, as JSON values. They are part of each file.
        names: what the models' labels stand for.
    """

    def __init__(
        self, folder: Path | None, settings: dict[str, Any], names: dict[str, str]
    ) -> None:
        self.folder = folder
        self.settings = settings
        self.names = names

    def find(self, cell: Cell) -> Outcome | None:
        """The row's outcome, if it is there.

        Raises:
            ValueError: its file belongs to an evaluation with other settings or problems.
        """
        if self.folder is None or not self.path(cell).exists():
            return None
        saved = read_json(self.path(cell), "the row")
        check_same_run(saved["settings"], self.settings_of(cell), self.path(cell))
        return Outcome(**saved["outcome"])

    def save(self, cell: Cell, outcome: Outcome) -> None:
        if self.folder is not None:
            row = {"settings": self.settings_of(cell), "outcome": asdict(outcome)}
            save_json(self.path(cell), row)

    def settings_of(self, cell: Cell) -> dict[str, Any]:
        return {"model": self.names[cell.model], **self.settings}

    def path(self, cell: Cell) -> Path:
        name = f"{cell.model} {cell.rule} {cell.tau_dec:g} {cell.convergence}"
        readable = re.sub(r"[^\w.]+", "-", name).strip("-")[-80:]
        assert self.folder is not None
        return self.folder / f"{readable}-{zlib.crc32(name.encode()):08x}.json"


def identity(prompts: list[Prompt]) -> str:
    """Identifies the problems, with their answers."""
    records = json.dumps([prompt.record for prompt in prompts], sort_keys=True)
    return f"{fingerprint(prompts)}, records crc {zlib.crc32(records.encode()):08x}"
