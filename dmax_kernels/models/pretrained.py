"""Loading Hugging Face models with LLaDA2's interface, by name or from a folder."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from dmax_kernels.models.checkpoint import SHIPPED, load_checkpoint
from dmax_kernels.models.end_tokens import end_token_ids


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

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """What ends an answer; the first is what training adds."""
        return end_token_ids(self.model, self.tokenizer, self.defaults.eos_token_id)


def model_defaults(name: str, config: Any) -> Defaults:
    """Those of a known name; of a folder or another name, from the config."""
    if name in KNOWN:
        return KNOWN[name]
    known = LLADA2 if getattr(config, "model_type", "").startswith("llada2") else {}
    ids = {key: found for key in known if (found := getattr(config, key, None)) is not None}
    length = getattr(config, "block_length", None) or 32
    return Defaults(**{**known, **ids}, block_length=length)


def load_pretrained(
    name: str,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    attention: str = "sdpa",
) -> Loaded:
    """`load_checkpoint`, on a device, with how the model is decoded.

    Args:
        name: a name on the Hugging Face hub (see `KNOWN`), a folder, or a shipped checkpoint of the
            demo ("base", "oput", "control").
        dtype: of the weights; by default what the checkpoint says.
        device: where to put it; "auto" spreads a large model over the devices there are.
        attention: sdpa adds a 4-D float mask, which LLaDA2's code needs for decoding.
    """
    spread = str(device) == "auto"
    model, tokenizer = load_checkpoint(
        name, dtype=dtype, attention=attention, device_map="auto" if spread else None
    )
    if not spread:
        model = model.to(torch.device(device))
    defaults = model_defaults(name, model.config)
    return Loaded(model, tokenizer, replace(defaults, pad_prompts=name in SHIPPED))
