"""The masked-diffusion objective of the base model and of the control (Eq. 1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dmax_kernels.training.corrupt import block_mask
from dmax_kernels.training.data import Batch
from dmax_kernels.training.layout import Layout
from dmax_kernels.training.ops import select_ops

# Two independent corruptions share one pass over the clean tokens.
NUM_NOISY = 2


def mdlm_loss(model: nn.Module, batch: Batch, generator: torch.Generator, *, ops: str) -> Tensor:
    """Mean over masked positions: -sum_i 1[x_t^i = MASK] log p(x_0^i | x_t) / count.

    Each block draws its own t. Eq. 1 weighs a block's sum by 1/t; here all masked positions weigh
    the same, which has the same minimum and less variance (the weight is K at t = 1/K).
    """
    config = model.config
    target = batch.response
    layout = Layout(batch.tokens.shape[1], batch.prompt_length, config.block_length, NUM_NOISY)
    editable = torch.ones_like(target, dtype=torch.bool)
    masks = [block_mask(editable, config.block_length, generator) for _ in range(NUM_NOISY)]
    noisy = [target.masked_fill(masked, config.mask_token_id) for masked in masks]
    hidden = model.model(
        input_ids=layout.pack(noisy, batch.tokens),
        position_ids=layout.position_ids,
        attention_mask=layout.attention_mask,
    ).last_hidden_state
    masked = torch.stack(masks)
    logits = model.lm_head(torch.stack(layout.noisy_parts(hidden))[masked])
    masked_target = torch.stack([target] * NUM_NOISY)[masked]
    return select_ops(ops).oput_loss(logits, None, masked_target, reduction="mean")
