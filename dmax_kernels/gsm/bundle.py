"""A folder of finished models of word problems, with all that it takes to decode and grade them.

It is what `train --config gsm` exports: NAME.safetensors in float16, task.json with the vocabulary
and the problems, and rows.jsonl with what was measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from dmax_kernels.evaluation.cells import Problem
from dmax_kernels.files import read_json, save_json
from dmax_kernels.gsm import task
from dmax_kernels.gsm.rows import ROWS, Row, read_rows

TASK = "task.json"


@dataclass(frozen=True)
class Bundle:
    """Attributes: the folder, and of task.json words, sizes, learnt and problems by split."""

    folder: Path
    words: list[str]
    sizes: dict[str, int]
    learnt: list[int]
    problems: dict[str, list[dict[str, Any]]]

    @classmethod
    def open(cls, folder: Path) -> Bundle:
        if not (folder / TASK).is_file():
            need = "a folder that `train --config gsm` wrote"
            raise ValueError(f"--checkpoints must be {need}, got {folder} without {TASK}")
        return cls(folder, **read_json(folder / TASK, "--checkpoints"))

    def save(self) -> None:
        names = ("words", "sizes", "learnt", "problems")
        save_json(self.folder / TASK, {name: getattr(self, name) for name in names})

    @cached_property
    def tokenizer(self) -> Any:
        return task.build_tokenizer(self.words)

    @cached_property
    def vocabulary(self) -> task.Words:
        return task.Words.of(self.words)

    @property
    def names(self) -> list[str]:
        return sorted(path.stem for path in self.folder.glob("*.safetensors"))

    def model(self, name: str) -> nn.Module:
        path = self.folder / f"{name}.safetensors"
        if not path.is_file():
            need = f"one of those in {self.folder} ({', '.join(self.names)})"
            raise ValueError(f"the model must be {need}, got {name}")
        model = task.build_model(len(self.words), **self.sizes)
        load_half(model, path)
        return model.eval()

    def measured(self, records: list[dict[str, Any]]) -> list[Problem]:
        return [Problem(self.vocabulary.prompt(record), record) for record in records]

    def options(self, ops: str) -> dict[str, Any]:
        """The options of `spd_generate` that are the same in all cells."""
        return {
            "block_length": task.BLOCK,
            "max_new_tokens": task.MAX_NEW_TOKENS,
            "eos_token_id": (task.EOS_ID,),
            "ops": ops,
        }

    def rows(self) -> list[Row]:
        return read_rows(self.folder / ROWS)


def load_half(model: nn.Module, path: Path) -> None:
    """Into a model in float32: the file's float16 values, exactly."""
    weights = safetensors.torch.load_file(path)
    model.load_state_dict({key: value.to(torch.float32) for key, value in weights.items()})
