"""Loading Hugging Face models with LLaDA2's interface, by name or from a folder."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dmax_kernels.models.checkpoint import SHIPPED, load_checkpoint
from dmax_kernels.models.remote_code import (
    dtype_argument,
    prepare_remote_code,
    repair_loaded_model,
)


@dataclass(frozen=True)
class Defaults:
    """How a model is decoded unless one says otherwise; None: what its config says."""

    mask_token_id: int | None = None
    eos_token_id: int | None = None
    block_length: int = 32
    tau_dec: float = 0.5
    tau_acc: float = 0.9
    rule: str = "spd"
    note: str = ""
    pad_prompts: bool = False  # on the left to whole blocks, as the model was trained


LLADA2 = {"mask_token_id": 156895, "eos_token_id": 156892}
# Thresholds: DMax-Math and DMax-Coder from the paper's Table 1, DMax-16B from its authors' example,
# LLaDA2.0-mini from its own generate. LLaDA2's config has neither mask nor eos id
KNOWN = {
    "Zigeng/DMax-16B": Defaults(**LLADA2, tau_dec=0.0),
    "Zigeng/DMax-Math-16B": Defaults(**LLADA2, tau_dec=0.5),
    "Zigeng/DMax-Coder-16B": Defaults(**LLADA2, tau_dec=0.65),
    "inclusionAI/LLaDA2.0-mini": Defaults(
        **LLADA2,
        tau_dec=0.95,
        rule="threshold",
        note="trained without OPUT: soft parallel decoding (--rule spd) collapses on it",
    ),
}


@dataclass
class Loaded:
    model: Any
    tokenizer: Any
    defaults: Defaults


def model_defaults(name: str, config: Any) -> Defaults:
    """Those of a known name; of a folder or another name, from the config."""
    if name in KNOWN:
        return KNOWN[name]
    known = LLADA2 if getattr(config, "model_type", "").startswith("llada2") else {}
    ids = {key: found for key in known if (found := getattr(config, key, None)) is not None}
    length = getattr(config, "block_length", None) or 32
    return Defaults(**{**known, **ids}, block_length=length)


def load_pretrained(
    name: str, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> Loaded:
    """Model in evaluation mode, tokenizer, and how the model is decoded.

    Runs the checkpoint's own code (`trust_remote_code=True`), with the shims it needs under
    transformers 5, and sdpa attention, which is the one that adds a 4-D float mask.

    Args:
        name: a name on the Hugging Face hub (see `KNOWN`), a folder, or a shipped checkpoint of the
            demo ("base", "oput", "control").
        dtype: of the weights; by default what the checkpoint says.
        device: where to put it; "auto" spreads a large model over the devices there are.

    Raises:
        ValueError: a folder without config.json, or a name that cannot be loaded; one sentence.
    """
    if name in SHIPPED:
        model, tokenizer = load_checkpoint(name)
        model = model.to(device=torch.device(device), dtype=dtype)
        defaults = replace(model_defaults(name, model.config), pad_prompts=True)
        return Loaded(model, tokenizer, defaults)
    if Path(name).exists() and not (Path(name) / "config.json").is_file():
        raise ValueError(f"load_pretrained: name must be a folder with a config.json, got {name!r}")
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    prepare_remote_code()
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=True)
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)
    except OSError as error:  # transformers' own text runs over many lines
        reason = str(error).splitlines()[0]
        if Path(name).is_dir():
            raise ValueError(
                "load_pretrained: name must be a folder that holds config, weights, tokenizer and "
                f"the model's own code, got {name!r} ({reason})"
            ) from error
        raise ValueError(
            f"load_pretrained: name must be a model on the Hugging Face hub, a folder with one, or "
            f"one of {', '.join(SHIPPED)}, got {name!r} ({reason})"
        ) from error
    model = AutoModelForCausalLM.from_pretrained(
        name,
        config=config,
        trust_remote_code=True,
        attn_implementation="sdpa",
        **dtype_argument(dtype),
        device_map=device if str(device) == "auto" else None,
    )
    repair_loaded_model(model)
    if str(device) != "auto":
        model = model.to(torch.device(device))
    return Loaded(model.eval(), tokenizer, model_defaults(name, config))
