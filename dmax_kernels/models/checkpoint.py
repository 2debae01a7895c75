"""Loads checkpoints, by a shipped name, from a folder or from the hub, and writes them."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import cached_file, logging

# Imported for its effect: it registers the shipped checkpoints' model with the Auto classes
import dmax_kernels.ring_walk.model  # noqa: F401
from dmax_kernels.models.remote_code import (
    code_for_transformers_4,
    dropped_rotary,
    dtype_argument,
    repair_loaded_model,
)

SHIPPED_DIR = Path(__file__).parent.parent / "ring_walk" / "weights"
# Of the demo: the recipe's three, and the trainings of 200 steps that its tables compare
SHIPPED = (
    *("base", "oput", "control"),
    *("oput-200", "control-200", "uniform-200", "certainty-200"),
)
HUB_NAME = r"[\w.-]+/[\w.-]+"


def write_like(
    source: Path, model: Any, tokenizer: Any, weights: dict[str, Tensor], path: Path
) -> None:
    """Writes a checkpoint folder for a model that was loaded from `source`, with new weights.

    Code that came with the checkpoint is copied, since the folder could not be loaded without it.
    The generation config is written here, unchanged: transformers loads some configs that it then
    refuses to save (a temperature with do_sample = false), and it saves none for classes without
    its own generate.
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
    """The folder that holds the code and config of a checkpoint loaded by this name."""
    if str(name) in SHIPPED:
        return SHIPPED_DIR / str(name)
    if Path(name).is_dir():
        return Path(name)
    return Path(cached_file(str(name), "config.json")).parent  # in the hub's cache


def load_checkpoint(
    name: str | os.PathLike,
    *,
    dtype: torch.dtype | None = None,
    attention: str = "sdpa",
    device_map: Any = None,
) -> tuple[Any, Any]:
    """The model, in evaluation mode, and its tokenizer. Every command loads through this function.

    It runs the checkpoint's own code (`trust_remote_code=True`), with the shims that such code
    needs under transformers 5 (`remote_code`).

    Args:
        name: "base", "oput" or "control", a folder, or a name on the Hugging Face hub.
        dtype: the dtype of the weights; by default, the checkpoint's.
        attention: transformers' `attn_implementation`; a model without sdpa gets eager instead.

    Raises:
        ValueError: the folder has no config.json, or the name cannot be loaded; one sentence.
    """
    shipped = str(name) in SHIPPED
    path = SHIPPED_DIR / str(name) if shipped else name
    here = (Path(path) / "config.json").is_file()
    if not here and (Path(path).exists() or not re.fullmatch(HUB_NAME, str(name))):
        raise ValueError(
            f"load_checkpoint: name must be one of {', '.join(SHIPPED)}, a folder with a "
            f"config.json, or OWNER/NAME on the Hugging Face hub, got {str(name)!r}"
        )
    if shipped and dtype is None:
        # Some of the files hold float16, and transformers before 4.56 does not see what their
        # configs say
        dtype = torch.float32
    trust = {} if shipped else {"trust_remote_code": True}
    try:
        with no_progress_bar(), code_for_transformers_4():
            config = AutoConfig.from_pretrained(path, **trust)
            tokenizer = AutoTokenizer.from_pretrained(path, **trust)
            options = {"config": config, "device_map": device_map, **trust, **dtype_argument(dtype)}
            load = partial(AutoModelForCausalLM.from_pretrained, path, **options)
            with dropped_rotary(config):
                try:
                    model = load(attn_implementation=attention)
                except ValueError as error:  # it comes before the weights are read
                    if attention != "sdpa" or "scaled_dot_product_attention" not in str(error):
                        raise
                    model = load(attn_implementation="eager")
    except ModuleNotFoundError:  # the checkpoint's code needs a package that is missing
        raise
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        reason = " ".join(str(error).split())  # transformers' text has many lines
        raise ValueError(
            "load_checkpoint: name must be a checkpoint whose config, weights, tokenizer and code "
            f"can be loaded, got {str(name)!r} ({reason:.300})"
        ) from error
    if not shipped:
        repair_loaded_model(model)
    if getattr(model, "generation_config", None) is None:
        # transformers loads it only for classes with its own generate; `end_tokens` needs it always
        with suppress(OSError):
            model.generation_config = GenerationConfig.from_pretrained(path)
    return model.eval(), tokenizer


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """Hides transformers' own progress bars, which it draws even for a small file."""
    bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if bar:
            logging.enable_progress_bar()
