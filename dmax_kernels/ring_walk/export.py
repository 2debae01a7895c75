"""A new tiny model, its tokenizer, and the Hugging Face folder that both are saved as."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from dmax_kernels.files import replace_folder
from dmax_kernels.models.checkpoint import no_progress_bar
from dmax_kernels.ring_walk import task
from dmax_kernels.ring_walk.model import TinyDlmConfig, TinyDlmForCausalLM


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
    # transformers 5 writes a class name that 4.x does not know; both know this one.
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
    """Config, safetensors, the model's code and the tokenizer, into a folder."""
    with no_progress_bar():
        model.save_pretrained(path, state_dict=weights)
    save_tokenizer(path)


def save_checkpoint(
    model: TinyDlmForCausalLM, path: Path, weights: dict[str, Tensor] | None = None
) -> None:
    """`write_checkpoint` into a folder that appears whole.

    Raises:
        ValueError: a folder of that name is there and is no checkpoint: it is left as it is.
    """
    if path.exists() and not (path / "config.json").is_file():
        raise ValueError(f"save_checkpoint: path must be free or a checkpoint's, got {path}")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        write_checkpoint(model, temporary, weights)
        replace_folder(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
