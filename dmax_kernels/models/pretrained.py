"""Loads Hugging Face models together with the settings with which they are decoded."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from dmax_kernels.models.checkpoint import SHIPPED, load_checkpoint
from dmax_kernels.models.end_tokens import end_token_ids


@dataclass(frozen=True)
class Defaults:
    """How a model is decoded unless the user says otherwise; None stands for the config's value."""

    mask_token_id: int | None = None
    eos_token_id: int | None = None
    block_length: int = 32
    tau_dec: float = 0.5
    tau_acc: float = 0.9
    rule: str = "spd"
    note: str = ""
    pad_prompts: bool = False  # on the left to whole blocks, as in its training


LLADA2 = {"mask_token_id": 156895, "eos_token_id": 156892}
# The thresholds of DMax-Math and DMax-Coder are in the paper's Table 1, that of DMax-16B in its
# authors' example and that of LLaDA2.0-mini in its own generate. LLaDA2's config has no mask or eos
# id.
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

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer; the first is the one that training appends."""
        return end_token_ids(self.model, self.tokenizer, self.defaults.eos_token_id)

    def decode_options(self, given: dict[str, Any]) -> dict[str, Any]:
        """Options of `spd_generate`: what suits the model, and over it what was given."""
        known = {
            name: getattr(self.defaults, name)
            for name in ("block_length", "tau_dec", "tau_acc", "rule", "mask_token_id")
        }
        return {**known, "eos_token_id": self.eos_token_ids, **given}


def model_defaults(name: str, config: Any) -> Defaults:
    """The defaults of a known name; for a folder or any other name, those in its config."""
    if name in KNOWN:
        return KNOWN[name]
    known = LLADA2 if getattr(config, "model_type", "").startswith("llada2") else {}
    ids = {key: found for key in known if (found := getattr(config, key, None)) is not None}
    length = getattr(config, "block_length", None) or 32
    return Defaults(**{**known, **ids}, block_length=length)


def defaults_of(name: str) -> Defaults:
    """The defaults of a model by its name alone, without loading its weights."""
    return KNOWN.get(name, Defaults())


def load_pretrained(
    name: str,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    attention: str = "sdpa",
) -> Loaded:
    """Loads a checkpoint onto a device, together with its decoding defaults.

    Args:
        name: a name on the Hugging Face hub (see `KNOWN`), a folder, or a shipped checkpoint of the
            demo ("base", "oput", "control").
        dtype: the dtype of the weights; by default, the checkpoint's.
        device: "auto" spreads a large model over all available devices.
        attention: "sdpa" takes the 4-D float mask that LLaDA2's code needs for decoding.
    """
    spread = str(device) == "auto"
    model, tokenizer = load_checkpoint(
        name, dtype=dtype, attention=attention, device_map="auto" if spread else None
    )
    if not spread:
        model = model.to(torch.device(device))
    defaults = model_defaults(name, model.config)
    return Loaded(model, tokenizer, replace(defaults, pad_prompts=name in SHIPPED))
