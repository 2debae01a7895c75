"""What LLaDA2's remote code, written for transformers 4.5x, lacks under transformers 5.

Each shim says when to delete it. None of them touches what transformers already has, so that under
4.5x nothing changes.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import modeling_rope_utils
from transformers.utils import import_utils


def prepare_remote_code() -> None:
    """Call before `from_pretrained(..., trust_remote_code=True)` of an LLaDA2 checkpoint."""
    # transformers 5 dropped this name, which the code imports to guard a torch.fx wrapper that
    # torch >= 1.13 does not need. Delete when the checkpoints' code no longer imports it.
    if not hasattr(import_utils, "is_torch_fx_available"):
        import_utils.is_torch_fx_available = lambda: False
    # transformers 5 moved unscaled rotary embeddings from this table into each model's file.
    # Delete when the checkpoints' code brings its own.
    modeling_rope_utils.ROPE_INIT_FUNCTIONS.setdefault("default", unscaled_rotary_frequencies)


def dtype_argument(dtype: torch.dtype | None) -> dict[str, Any]:
    """`from_pretrained`'s dtype: named torch_dtype before transformers 4.56.

    Delete when pyproject.toml asks for transformers >= 4.56.
    """
    major, minor = (int(part) for part in transformers.__version__.split(".")[:2])
    name = "dtype" if (major, minor) >= (4, 56) else "torch_dtype"
    return {name: "auto" if dtype is None else dtype}


def unscaled_rotary_frequencies(
    config: Any, device: torch.device | None = None, seq_len: int | None = None, **_: Any
) -> tuple[Tensor, float]:
    """base^(-2i / dim) for i < dim / 2, with dim the rotated part of a head; and no scaling."""
    base = getattr(config, "rope_theta", None)
    if base is None:
        base = config.rope_parameters["rope_theta"]
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rotated = int(head * getattr(config, "partial_rotary_factor", 1.0))
    exponent = torch.arange(0, rotated, 2, dtype=torch.float32, device=device) / rotated
    return base**-exponent, 1.0


def repair_loaded_model(model: Any) -> None:
    """Call after `from_pretrained`: gives buffers that no checkpoint holds the values of the code.

    transformers 5 builds models on the meta device, and buffers that are not in the checkpoint
    (rotary frequencies, tables of sines) come back with whatever the memory held, unless the
    model's own `_init_weights` fills them, which the code written for 4.5x does not: positions
    would be rotated by garbage, silently. The model is built once more, with buffers and without
    weights, and its buffers are copied. Delete when the checkpoints' code is written for
    transformers 5.
    """
    of_transformers = type(model).__module__.startswith("transformers.")
    if of_transformers or not any(m._non_persistent_buffers_set for m in model.modules()):
        return
    on_meta = register_module_parameter_registration_hook(
        lambda module, name, parameter: nn.Parameter(
            parameter.detach().to("meta"), requires_grad=parameter.requires_grad
        )
    )
    try:
        with torch.random.fork_rng(devices=[]):
            fresh = type(model)._from_config(deepcopy(model.config), **dtype_argument(model.dtype))
    finally:
        on_meta.remove()
    loaded = dict(model.named_modules())
    for name, built in fresh.named_modules():
        module = loaded.get(name)
        if module is None:
            continue
        for key in built._non_persistent_buffers_set & module._buffers.keys():
            module._buffers[key] = like(module._buffers[key], built._buffers[key])
        for key, value in vars(built).items():  # such as original_inv_freq, which is no buffer
            if isinstance(value, Tensor) and key in vars(module):
                setattr(module, key, like(getattr(module, key), value))


def like(old: Tensor | None, new: Tensor | None) -> Tensor | None:
    """`new` where `old` is; what was never given memory stays on the CPU."""
    if old is None or new is None or old.is_meta:
        return new
    return new.to(device=old.device, dtype=old.dtype)
