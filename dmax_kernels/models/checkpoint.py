"""Saving and loading of checkpoints in Hugging Face folders."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import logging

from dmax_kernels.ring_walk import task
from dmax_kernels.ring_walk.model import TinyDlmConfig, TinyDlmForCausalLM

SHIPPED_DIR = Path(__file__).parent.parent / "ring_walk" / "weights"
SHIPPED = ("base", "oput", "control")

REMOTE_CODE = ("configuration_tiny_dlm.py", "modeling_tiny_dlm.py")
AUTO_MAP = {
    "AutoConfig": "configuration_tiny_dlm.TinyDlmConfig",
    "AutoModelForCausalLM": "modeling_tiny_dlm.TinyDlmForCausalLM",
}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The word-level tokenizer of ring walks: words are what spaces separate."""
    tokenizer = Tokenizer(WordLevel(dict(task.ID_OF), unk_token=task.UNK))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=task.PAD,
        mask_token=task.MASK,
        eos_token=task.EOS,
        unk_token=task.UNK,
        padding_side="left",
    )


def save_tokenizer(path: Path) -> None:
    build_tokenizer().save_pretrained(path)
    # transformers 5 writes a class name that 4.x does not know; this one both do.
    config_file = path / "tokenizer_config.json"
    config = json.loads(config_file.read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config_file.write_text(json.dumps(config, indent=2) + "\n")


def build_model(block_length: int) -> TinyDlmForCausalLM:
    """A new model for ring walks, initialised from torch's global generator."""
    return TinyDlmForCausalLM(
        TinyDlmConfig(
            vocab_size=len(task.WORDS),
            block_length=block_length,
            mask_token_id=task.MASK_ID,
            eos_token_id=task.EOS_ID,
            pad_token_id=task.PAD_ID,
        )
    )


def write_checkpoint(
    model: TinyDlmForCausalLM, path: Path, weights: dict[str, Tensor] | None = None
) -> None:
    """Config, safetensors, tokenizer and the model's code, into a folder."""
    model.config.auto_map = dict(AUTO_MAP)
    with no_progress_bar():
        model.save_pretrained(path, state_dict=weights)
    save_tokenizer(path)
    for name in REMOTE_CODE:
        shutil.copyfile(SHIPPED_DIR.parent / "model" / name, path / name)


def save_checkpoint(model: TinyDlmForCausalLM, path: Path) -> None:
    """`write_checkpoint` into a folder that appears whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        write_checkpoint(model, temporary)
        if path.exists():
            shutil.rmtree(path)
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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


def checkpoint_folder(name: str | os.PathLike) -> Path:
    """The folder of a shipped checkpoint or, as it is, of any other."""
    path = SHIPPED_DIR / str(name) if str(name) in SHIPPED else Path(name)
    if not (path / "config.json").is_file():
        raise ValueError(
            f"load_checkpoint: name must be one of {', '.join(SHIPPED)} or a folder with a "
            f"config.json, got {str(name)!r}"
        )
    return path


def load_checkpoint(
    name: str | os.PathLike, **options: Any
) -> tuple[TinyDlmForCausalLM, PreTrainedTokenizerFast]:
    """Model (in evaluation mode) and tokenizer of a shipped checkpoint or of a folder.

    Args:
        name: "base", "oput" or "control", or the path of a Hugging Face folder, whose own code is
            run (`trust_remote_code=True`).
        options: for the model's `from_pretrained`, such as `attn_implementation`.
    """
    path = checkpoint_folder(name)
    with no_progress_bar():
        if str(name) in SHIPPED:
            model = TinyDlmForCausalLM.from_pretrained(path, **options)
            tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
        else:
            model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, **options)
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
    return model.eval(), tokenizer


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
