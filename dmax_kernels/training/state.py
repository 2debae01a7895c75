"""Files of a training run: each is written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Writes a temporary file beside `path`, then renames it: an interruption leaves no half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_state(path: Path, state: dict[str, Any]) -> None:
    write_atomically(path, lambda file: torch.save(state, file))


def load_state(path: Path) -> dict[str, Any] | None:
    """The state saved at `path`, or None where there is none."""
    if not path.exists():
        return None
    return torch.load(path, weights_only=True)


def save_json(path: Path, value: Any) -> None:
    write_atomically(path, lambda file: file.write_text(json.dumps(value, indent=1) + "\n"))
