"""Saving and loading of checkpoints in Hugging Face folders."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import logging

from dmax_kernels.models import ring_walk
from dmax_kernels.models.tiny_dlm import TinyDlmConfig, TinyDlmForCausalLM

SHIPPED_DIR = Path(__file__).parent.parent / "checkpoints" / "ring_walk"
SHIPPED = ("base", "oput", "control")

REMOTE_CODE = ("configuration_tiny_dlm.py", "modeling_tiny_dlm.py")
AUTO_MAP = {
    "AutoConfig": "configuration_tiny_dlm.TinyDlmConfig",
    "AutoModelForCausalLM": "modeling_tiny_dlm.TinyDlmForCausalLM",
}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The word-level tokenizer of ring walks: words are what spaces separate."""
    tokenizer = Tokenizer(WordLevel(dict(ring_walk.ID_OF), unk_token=ring_walk.UNK))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=ring_walk.PAD,
        mask_token=ring_walk.MASK,
        eos_token=ring_walk.EOS,
        unk_token=ring_walk.UNK,
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
            vocab_size=len(ring_walk.WORDS),
            block_length=block_length,
            mask_token_id=ring_walk.MASK_ID,
            eos_token_id=ring_walk.EOS_ID,
            pad_token_id=ring_walk.PAD_ID,
        )
    )


def save_checkpoint(model: TinyDlmForCausalLM, path: Path) -> None:
    """Writes config, safetensors, tokenizer and the model's code; the folder appears whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        model.config.auto_map = dict(AUTO_MAP)
        model.save_pretrained(temporary)
        save_tokenizer(temporary)
        for name in REMOTE_CODE:
            shutil.copyfile(Path(__file__).parent / "tiny_dlm" / name, temporary / name)
        if path.exists():
            shutil.rmtree(path)
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load_checkpoint(name: str | os.PathLike) -> tuple[TinyDlmForCausalLM, PreTrainedTokenizerFast]:
    """Model (in evaluation mode) and tokenizer of a shipped checkpoint or of a folder.

    Args:
        name: "base", "oput" or "control", or the path of a Hugging Face folder, whose own code is
            run (`trust_remote_code=True`).
    """
    shipped = str(name) in SHIPPED
    path = SHIPPED_DIR / str(name) if shipped else Path(name)
    if not (path / "config.json").is_file():
        raise ValueError(
            f"load_checkpoint: name must be one of {', '.join(SHIPPED)} or a folder with a "
            f"config.json, got {str(name)!r}"
        )
    bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        if shipped:
            model = TinyDlmForCausalLM.from_pretrained(path)
            tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
        else:
            model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
    finally:
        if bar:
            logging.enable_progress_bar()
    return model.eval(), tokenizer
