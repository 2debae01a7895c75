"""Saving and loading of checkpoints in Hugging Face folders."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
)
from transformers.utils import cached_file, logging

from dmax_kernels.files import replace_folder
from dmax_kernels.models import ring_walk
from dmax_kernels.models.remote_code import (
    dtype_argument,
    prepare_remote_code,
    repair_loaded_model,
)
from dmax_kernels.models.tiny_dlm import TinyDlmConfig, TinyDlmForCausalLM

SHIPPED_DIR = Path(__file__).parent.parent / "checkpoints" / "ring_walk"
SHIPPED = ("base", "oput", "control")
HUB_NAME = r"[\w.-]+/[\w.-]+"

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


def write_checkpoint(
    model: TinyDlmForCausalLM, path: Path, weights: dict[str, Tensor] | None = None
) -> None:
    """Config, safetensors, tokenizer and the model's code, into a folder."""
    model.config.auto_map = dict(AUTO_MAP)
    with no_progress_bar():
        model.save_pretrained(path, state_dict=weights)
    save_tokenizer(path)
    for name in REMOTE_CODE:
        shutil.copyfile(Path(__file__).parent / "tiny_dlm" / name, path / name)


def save_checkpoint(model: TinyDlmForCausalLM, path: Path) -> None:
    """`write_checkpoint` into a folder that appears whole.

    Raises:
        ValueError: a folder of that name is there and is no checkpoint: it is left as it is.
    """
    if path.exists() and not (path / "config.json").is_file():
        raise ValueError(f"save_checkpoint: path must be free or a checkpoint's, got {path}")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        write_checkpoint(model, temporary)
        replace_folder(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_like(
    source: Path, model: Any, tokenizer: Any, weights: dict[str, Tensor], path: Path
) -> None:
    """A folder for a model that was loaded from `source`, with other weights.

    Code that came with the checkpoint goes along: without it the folder could not be loaded. The
    generation config is written as it is: transformers refuses to save one that it reads, such as
    a temperature beside do_sample = false, and saves none for classes without its own generate.
    """
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        model.generation_config = GenerationConfig()
    try:
        with no_progress_bar():
            model.save_pretrained(path, state_dict=weights)
    finally:
        if generation is not None:
            model.generation_config = generation
    if generation is not None:
        (path / "generation_config.json").write_text(generation.to_json_string(), "utf-8")
    tokenizer.save_pretrained(path)
    for file in source.glob("*.py"):
        shutil.copyfile(file, path / file.name)


def checkpoint_folder(name: str | os.PathLike) -> Path:
    """The folder with the code and configuration of a checkpoint that was loaded by this name."""
    if str(name) in SHIPPED:
        return SHIPPED_DIR / str(name)
    if Path(name).is_dir():
        return Path(name)
    return Path(cached_file(str(name), "config.json")).parent  # of the hub's files on this machine


def load_checkpoint(
    name: str | os.PathLike,
    *,
    dtype: torch.dtype | None = None,
    attention: str = "sdpa",
    device_map: Any = None,
) -> tuple[Any, Any]:
    """Model (in evaluation mode) and tokenizer: the one loader of every command.

    Runs the checkpoint's own code (`trust_remote_code=True`), with the shims that it needs under
    transformers 5 (`remote_code`).

    Args:
        name: "base", "oput" or "control", a folder, or a name on the Hugging Face hub.
        dtype: of the weights; by default what the checkpoint says.
        attention: transformers' `attn_implementation`. A model without sdpa gets its eager one.

    Raises:
        ValueError: a folder without config.json, or a name that cannot be loaded; one sentence.
    """
    shipped = str(name) in SHIPPED
    path = SHIPPED_DIR / str(name) if shipped else name
    here = (Path(path) / "config.json").is_file()
    if not here and (Path(path).exists() or not re.fullmatch(HUB_NAME, str(name))):
        raise ValueError(
            f"load_checkpoint: name must be one of {', '.join(SHIPPED)}, a folder with a "
            f"config.json, or OWNER/NAME on the Hugging Face hub, got {str(name)!r}"
        )
    config_class, model_class, tokenizer_class, trust = (
        (TinyDlmConfig, TinyDlmForCausalLM, PreTrainedTokenizerFast, {})
        if shipped
        else (AutoConfig, AutoModelForCausalLM, AutoTokenizer, {"trust_remote_code": True})
    )
    prepare_remote_code()
    try:
        with no_progress_bar():
            config = config_class.from_pretrained(path, **trust)
            tokenizer = tokenizer_class.from_pretrained(path, **trust)
            options = {"config": config, "device_map": device_map, **trust, **dtype_argument(dtype)}
            try:
                model = model_class.from_pretrained(path, attn_implementation=attention, **options)
            except ValueError as error:  # raised before the weights are read
                if attention != "sdpa" or "scaled_dot_product_attention" not in str(error):
                    raise
                model = model_class.from_pretrained(path, attn_implementation="eager", **options)
    except ModuleNotFoundError:  # of a package that this one needs
        raise
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        reason = " ".join(str(error).split())  # transformers' own text runs over many lines
        raise ValueError(
            "load_checkpoint: name must be a checkpoint whose config, weights, tokenizer and code "
            f"can be loaded, got {str(name)!r} ({reason:.300})"
        ) from error
    if not shipped:
        repair_loaded_model(model)
    if getattr(model, "generation_config", None) is None:
        # transformers reads it only for classes with its generate; `end_tokens` wants it for all
        with suppress(OSError):
            model.generation_config = GenerationConfig.from_pretrained(path)
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
