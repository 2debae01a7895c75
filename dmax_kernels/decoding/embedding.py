"""The table [V, D] of what the model's input embedding makes of each token id.

The loop looks rows up and the step mixes them. The model's own module may do more than look up rows
of `weight`: scale them (Gemma 3), add an adapter's part (LoRA), or first load an offloaded weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dmax_kernels._checks import one_of, require

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = 2**-6  # of a row's largest value: how differently two batch sizes may round in bfloat16


def is_lookup(module: Any) -> bool:
    """Whether the module's forward is known to give rows of its `weight` and nothing else."""
    hooks = ("_forward_hooks", "_forward_pre_hooks")
    return (
        type(module) is nn.Embedding
        and type(module.weight) in (Tensor, nn.Parameter)
        and not module.weight.is_meta
        and module.max_norm is None
        and "forward" not in vars(module)  # accelerate puts its own on the instance
        and not any(getattr(module, name) for name in hooks)
    )


def check_model(model: Any) -> int:
    """The size of the vocabulary, if the step after the forward pass can read this model."""
    weight: Any = getattr(model.get_input_embeddings(), "weight", None)
    got = "no weight"
    if weight is not None:
        got = f"{type(weight).__name__} of {weight.dtype}, {list(weight.shape)}"
    # A quantised head is fine, because the model's own forward applies it. The embedding's rows
    # are read and mixed by the step itself.
    require(
        weight is not None and weight.dim() == 2 and weight.dtype in FLOATS,
        "spd_generate: the model's input embedding",
        "a float32, bfloat16 or float16 table [V, D]; load it without quantising the embedding",
        got,
    )
    # LLaDA2's eager attention reads a 4-D mask as 1 = attend; its sdpa attention adds the mask
    attention = getattr(model.config, "_attn_implementation", None)
    if getattr(model.config, "model_type", "").startswith("llada2"):
        require(
            attention == "sdpa",
            "spd_generate: the model's attention",
            "'sdpa' (from_pretrained(..., attn_implementation='sdpa')), which adds its 4-D mask",
            repr(attention),
        )
    return weight.shape[0]


def embedding_table(model: Any, mask_token_id: int) -> Tensor:
    """[V, D], detached: the weight if the module only looks up, else what its forward gives.

    The second takes one pass over the vocabulary and, while the run lasts, as much memory as the
    weight. If the forward turns out to be a plain lookup after all, the copy is dropped.

    Raises:
        ValueError: the forward fails, or does not give each token id one vector of its own.
    """
    module = model.get_input_embeddings()
    weight = module.weight.detach()
    if is_lookup(module):
        return weight
    vocabulary = weight.shape[0]
    table = run(module, torch.arange(vocabulary, device="cpu"))
    require(
        type(table) is Tensor
        and not table.is_meta
        and table.dtype in FLOATS
        and table.dim() == 2
        and len(table) == vocabulary,
        "spd_generate: the model's input embedding",
        f"a module that gives each of {vocabulary} token ids one vector, {one_of(FLOATS)}",
        f"{type(table).__name__} on {table.device} of {table.dtype}, {list(table.shape)}",
    )
    if type(weight) is Tensor and weight.device == table.device and torch.equal(weight, table):
        return weight
    # Ids at other positions beside other ids: their vectors must not depend on either
    probe = torch.tensor([mask_token_id, 0, mask_token_id], device="cpu")
    again, rows = run(module, probe), table[probe.to(table.device)]
    limit = TOLERANCE * rows.abs().amax(dim=-1, keepdim=True)
    require(
        bool(((again - rows).abs() <= limit).all()),
        "spd_generate: the model's input embedding",
        "a module that gives a token id one vector at every position, without dropout or noise",
        f"{type(module).__name__}, which gave tokens 0 and {mask_token_id} two vectors each",
    )
    return table


def embedding_device(model: Any) -> torch.device:
    """The device of the table that `embedding_table` makes."""
    module = model.get_input_embeddings()
    if is_lookup(module):
        return module.weight.device
    return run(module, torch.zeros(1, dtype=torch.int64, device="cpu")).device


def run(module: Any, ids: Tensor) -> Tensor:
    """The module's own forward on ids [N], a row of tokens as the model would pass it: [N, D]."""
    device = module.weight.device
    ids = ids if device.type == "meta" else ids.to(device)
    try:
        return module(ids.unsqueeze(0)).squeeze(0).detach()
    except (RuntimeError, TypeError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(
            "spd_generate: the model's input embedding must be a module that can be called with "
            f"token ids, got {type(module).__name__}, which raised: {reason}"
        ) from error
