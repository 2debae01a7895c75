"""Loading of checkpoints, shipped ones by name and others from their folder, and writing alike."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

# Imported for what it does: it makes the Auto classes know the shipped checkpoints' model
import dmax_kernels.ring_walk.model  # noqa: F401

SHIPPED_DIR = Path(__file__).parent.parent / "ring_walk" / "weights"
SHIPPED = ("base", "oput", "control")


def checkpoint_folder(name: str | os.PathLike) -> Path:
    """The folder of a shipped checkpoint or, as it is, of any other."""
    path = SHIPPED_DIR / str(name) if str(name) in SHIPPED else Path(name)
    if not (path / "config.json").is_file():
        raise ValueError(
            f"load_checkpoint: name must be one of {', '.join(SHIPPED)} or a folder with a "
            f"config.json, got {str(name)!r}"
        )
    return path


def load_checkpoint(name: str | os.PathLike, **options: Any) -> tuple[Any, Any]:
    """Model (in evaluation mode) and tokenizer of a shipped checkpoint or of a folder.

    Args:
        name: "base", "oput" or "control", or the path of a Hugging Face folder, whose own code is
            run (`trust_remote_code=True`).
        options: for the model's `from_pretrained`, such as `attn_implementation`.
    """
    path = checkpoint_folder(name)
    with no_progress_bar():
        model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, **options)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
    return model.eval(), tokenizer


def write_like(
    source: Path, model: Any, tokenizer: Any, weights: dict[str, Tensor], path: Path
) -> None:
    """A folder for a model that was loaded from `source`, with other weights.

    Code that came with the checkpoint goes along: without it the folder could not be loaded.
    """
    with no_progress_bar():
        model.save_pretrained(path, state_dict=weights)
    tokenizer.save_pretrained(path)
    for file in source.glob("*.py"):
        shutil.copyfile(file, path / file.name)


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """transformers draws bars of its own, also for a small file."""
    bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if bar:
            logging.enable_progress_bar()
