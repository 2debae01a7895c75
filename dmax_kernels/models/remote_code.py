"""Shims for LLaDA2's remote code, which was written for transformers 4.5x, under transformers 5.

Each shim says when to delete it. None of them replaces anything that transformers already has, so
nothing changes under 4.5x.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import modeling_rope_utils
from transformers.utils import import_utils


@contextmanager
def code_for_transformers_4() -> Iterator[None]:
    """Around the import of a checkpoint's code, which its config may already cause."""
    # transformers 5 dropped this function, which the code imports to guard a torch.fx wrapper that
    # torch >= 1.13 does not need. Delete when the checkpoints' code no longer imports it.
    dropped = not hasattr(import_utils, "is_torch_fx_available")
    if dropped:
        import_utils.is_torch_fx_available = lambda: False
    try:
        with warnings.catch_warnings():
            # The config sets the old name, and transformers 5 takes it. Delete with the code.
            warnings.filterwarnings("ignore", "`rope_scaling` is deprecated", FutureWarning)
            yield
    finally:
        if dropped:
            del import_utils.is_torch_fx_available


@contextmanager
def dropped_rotary(config: Any) -> Iterator[None]:
    """Around the building of a model of this config.

    Models of transformers itself must not see it: they would look up "default" in the table and
    find this function instead of their own.
    """
    # transformers 5 moved unscaled rotary embeddings from this table into each model's file.
    # Delete when the checkpoints' code brings its own.
    table = modeling_rope_utils.ROPE_INIT_FUNCTIONS
    if "default" in table or type(config).__module__.startswith("transformers."):
        yield
        return
    table["default"] = unscaled_rotary_frequencies
    try:
        yield
    finally:
        del table["default"]


def dtype_argument(dtype: torch.dtype | None) -> dict[str, Any]:
    """The dtype argument of `from_pretrained`, which was torch_dtype before transformers 4.56.

    Delete when pyproject.toml asks for transformers >= 4.56.
    """
    major, minor = (int(part) for part in transformers.__version__.split(".")[:2])
    name = "dtype" if (major, minor) >= (4, 56) else "torch_dtype"
    return {name: "auto" if dtype is None else dtype}


def unscaled_rotary_frequencies(
    config: Any, device: torch.device | None = None, seq_len: int | None = None, **_: Any
) -> tuple[Tensor, float]:
    """base^(-2i / dim) for i < dim / 2, where dim is the rotated part of a head; scale 1."""
    base = getattr(config, "rope_theta", None)
    if base is None:
        base = config.rope_parameters["rope_theta"]
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rotated = int(head * getattr(config, "partial_rotary_factor", 1.0))
    exponent = torch.arange(0, rotated, 2, dtype=torch.float32, device=device) / rotated
    return base**-exponent, 1.0


def repair_loaded_model(model: Any) -> None:
    """To be called after `from_pretrained`: restores buffers that are not in the checkpoint.

    transformers 5 builds models on the meta device. Buffers that are not in the checkpoint (rotary
    frequencies, tables of sines) then hold whatever was in memory, unless the model's own
    `_init_weights` fills them. Code written for 4.5x does not, and positions would silently be
    rotated by garbage. So the model is built once more, with its buffers but without weights, and
    the buffers are copied. Delete when the checkpoints' code is written for transformers 5.
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
        with torch.random.fork_rng(devices=[]), dropped_rotary(model.config):
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
        for key, value in vars(built).items():  # such as original_inv_freq, which is not a buffer
            if isinstance(value, Tensor) and key in vars(module):
                setattr(module, key, like(getattr(module, key), value))


def like(old: Tensor | None, new: Tensor | None) -> Tensor | None:
    """`new` with the device and dtype of `old`, unless `old` is missing or on the meta device."""
    if old is None or new is None or old.is_meta:
        return new
    return new.to(device=old.device, dtype=old.dtype)
