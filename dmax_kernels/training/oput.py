"""On-policy uniform training: one step's loss (Section 3.1, Eqs. 3-6)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dmax_kernels.training.corrupt import uniform_mask
from dmax_kernels.training.data import Batch
from dmax_kernels.training.layout import Layout
from dmax_kernels.training.ops import select_ops


def rollout(
    model: nn.Module,
    batch: Batch,
    masked: Tensor,
    seed: Tensor,
    *,
    temperature: float,
    ops: str,
) -> tuple[Tensor, Tensor]:
    """The masked sequence x^(m) and the predicted one x^(p), int64 [B, L] (Eq. 3).

    x^(p) = x^(m) where it is not a mask, else a token drawn from p_theta(. | x^(m)) with the
    parameters of this very step; `temperature` 0 takes the most likely one.
    """
    config = model.config
    layout = Layout(batch.tokens.shape[1], batch.prompt_length, config.block_length, num_noisy=1)
    noisy_masked = batch.response.masked_fill(masked, config.mask_token_id)
    with torch.no_grad():
        hidden = model.model(
            input_ids=layout.pack([noisy_masked], batch.tokens),
            position_ids=layout.position_ids,
            attention_mask=layout.attention_mask,
        ).last_hidden_state
        (hidden,) = layout.noisy_parts(hidden)
        drawn, _ = select_ops(ops).sample_tokens(
            model.lm_head(hidden[masked]),
            seed,
            temperature=temperature,
            suppress_token=config.mask_token_id,
        )
    noisy_predicted = noisy_masked.clone()
    noisy_predicted[masked] = drawn
    return noisy_masked, noisy_predicted


def oput_step_loss(
    model: nn.Module,
    batch: Batch,
    generator: torch.Generator,
    *,
    ops: str,
    mask_ratio: tuple[float, float] = (0.75, 0.75),
    temperature: float = 0.0,
) -> Tensor:
    """Corrupt -> rollout -> two passes -> loss: mean over response positions of L_mask + L_pred.

    Both passes (Eq. 4) run as two noisy parts of one sequence and share the clean part. Both are
    held to the clean tokens at all response positions, masked or not (Eqs. 5-6).
    """
    config = model.config
    target = batch.response
    masked = uniform_mask(torch.ones_like(target, dtype=torch.bool), mask_ratio, generator)
    seed = torch.randint(2**62, (2,), generator=generator)
    noisy = rollout(model, batch, masked, seed, temperature=temperature, ops=ops)
    layout = Layout(batch.tokens.shape[1], batch.prompt_length, config.block_length, num_noisy=2)
    hidden = model.model(
        input_ids=layout.pack(list(noisy), batch.tokens),
        position_ids=layout.position_ids,
        attention_mask=layout.attention_mask,
    ).last_hidden_state
    hidden_masked, hidden_predicted = layout.noisy_parts(hidden)
    return select_ops(ops).oput_loss(
        model.lm_head(hidden_masked), model.lm_head(hidden_predicted), target, reduction="mean"
    )
