"""One step's corruption, rollout, passes and losses (section 3.1, Eqs. 1 and 3-6)."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from dmax_kernels.training.config import TrainConfig
from dmax_kernels.training.corrupt import block_mask, uniform_mask
from dmax_kernels.training.data import IGNORE, Batch
from dmax_kernels.training.layout import Layout
from dmax_kernels.training.model import DenoisingModel

MDLM_NUM_NOISY = 2  # two independent corruptions share one pass over the clean tokens
Losses = tuple[Tensor | None, Tensor | None]  # of the masked and of the predicted pass


@dataclass(frozen=True)
class Draws:
    """What is random in a step, for the whole batch: micro batches and processes take their rows.

    So neither changes what is masked, nor what the rollout draws.
    """

    start: int  # the first position drawn for
    masks: tuple[Tensor, ...]  # bool [B, W] each: one, or one per corruption of mdlm
    seed: Tensor  # int64 [B, W, 2]: (seed, offset) of the rollout at each position
    passes: tuple[bool, bool]  # whether the masked and the predicted pass run in this step
    num_learnt: int  # positions whose loss is averaged, over all processes


def draw(config: TrainConfig, batch: Batch, step: int) -> Draws:
    """The draws of `step`, which follow from the seed, the step and the batch alone."""
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    part, span = batch.rows(range(len(batch.names)), config.block_length)
    learnt = part.target != IGNORE
    if config.objective == "mdlm":
        masks = tuple(
            block_mask(part.editable, config.block_length, generator) for _ in range(MDLM_NUM_NOISY)
        )
        num_learnt = sum(int((masked & learnt).sum()) for masked in masks)
    else:
        masks = (uniform_mask(part.editable, config.mask_ratio, generator),)
        num_learnt = int(learnt.sum())
    key = torch.randint(2**62, (), generator=generator)
    offset = torch.arange(learnt.numel()).view(learnt.shape)
    return Draws(
        start=span.start,
        masks=masks,
        seed=torch.stack([key.expand_as(offset), offset], dim=-1),
        passes=(True, False) if config.objective == "mdlm" else oput_passes(config, step),
        num_learnt=num_learnt,
    )


def oput_passes(config: TrainConfig, step: int) -> tuple[bool, bool]:
    if config.passes == "joint":
        return True, True
    return step % 2 == 0, step % 2 == 1


def micro_batch_losses(
    net: DenoisingModel,
    config: TrainConfig,
    batch: Batch,
    draws: Draws,
    index: list[int],
    ops: ModuleType,
) -> Losses:
    """Each pass's loss, summed over these rows of the batch; None for a pass that does not run."""
    part, span = batch.rows(index, config.block_length)
    inside = slice(span.start - draws.start, span.stop - draws.start)
    rows = torch.as_tensor(index)
    masks = [masked[rows, inside] for masked in draws.masks]
    if config.objective == "mdlm":
        return mdlm_losses(net, config, part, span.start, masks, ops)
    return oput_losses(
        net, config, part, span.start, masks[0], draws.seed[rows, inside], draws, ops
    )


def mdlm_losses(
    net: DenoisingModel,
    config: TrainConfig,
    part: Batch,
    start: int,
    masks: list[Tensor],
    ops: ModuleType,
) -> Losses:
    """-sum_i 1[x_t^i = MASK] log p(x_0^i | x_t) over both corruptions (Eq. 1).

    Each block draws its own t. Eq. 1 weighs a block's sum by 1/t; here all masked positions weigh
    the same, which has the same minimum and less variance (the weight is K at t = 1/K).
    """
    layout = Layout(part.tokens.shape[1], start, config.block_length, len(masks))
    clean = part.tokens.to(net.device)
    learnt = torch.stack([masked & (part.target != IGNORE) for masked in masks])
    target = part.target.expand(len(masks), -1, -1)[learnt].to(net.device)
    at = flat_index(learnt, net.device)
    noisy = [
        clean[:, start:].masked_fill(masked.to(net.device), net.mask_token_id) for masked in masks
    ]

    def head(parts: list[Tensor], weight: Tensor | None, bias: Tensor | None) -> Losses:
        rows = torch.stack(parts).flatten(0, -2)[at]
        return dual_pass_loss(ops, rows, None, weight, bias, target)

    return summed(net(layout, noisy, clean, head))


def oput_losses(
    net: DenoisingModel,
    config: TrainConfig,
    part: Batch,
    start: int,
    masked: Tensor,
    seed: Tensor,
    draws: Draws,
    ops: ModuleType,
) -> Losses:
    """-sum_i log p(x_0^i | x^(m)) and -sum_i log p(x_0^i | x^(p)) (Eq. 5).

    Both passes (Eq. 4) run as two noisy parts of one sequence and share the clean part. Both are
    held to the clean tokens at all learnt positions, masked or not. Only those go through the head.
    """
    clean = part.tokens.to(net.device)
    noisy_masked = clean[:, start:].masked_fill(masked.to(net.device), net.mask_token_id)
    noisy = [noisy_masked] if draws.passes[0] else []
    if draws.passes[1]:
        noisy.append(
            rollout(net, config, clean, start, noisy_masked, masked, seed, ops),
        )
    layout = Layout(clean.shape[1], start, config.block_length, len(noisy))
    learnt = part.target != IGNORE
    target = part.target[learnt].to(net.device)
    at = flat_index(learnt, net.device)

    def head(parts: list[Tensor], weight: Tensor | None, bias: Tensor | None) -> Losses:
        rows = iter([states.flatten(0, -2)[at] for states in parts])
        masked_pass, predicted_pass = (next(rows) if runs else None for runs in draws.passes)
        return dual_pass_loss(ops, masked_pass, predicted_pass, weight, bias, target)

    return summed(net(layout, noisy, clean, head))


def dual_pass_loss(
    ops: ModuleType,
    masked_pass: Tensor | None,
    predicted_pass: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    target: Tensor,
) -> Losses:
    """Both losses of each position, from hidden states, or from logits where `weight` is None."""
    if weight is None:
        return ops.oput_loss(masked_pass, predicted_pass, target)
    return ops.linear_oput_loss(masked_pass, predicted_pass, weight, target, bias=bias)


@torch.no_grad()
def rollout(
    net: DenoisingModel,
    config: TrainConfig,
    clean: Tensor,
    start: int,
    noisy_masked: Tensor,
    masked: Tensor,
    seed: Tensor,
    ops: ModuleType,
) -> Tensor:
    """The predicted sequence x^(p), int64 [B, W] (Eq. 3).

    x^(p) = x^(m) where it is not a mask, else a token drawn from p_theta(. | x^(m)) with the
    parameters of this very step. The head runs at masked positions alone, and never predicts a
    mask. Each position has its own (seed, offset): a draw does not depend on the others.
    """
    layout = Layout(clean.shape[1], start, config.block_length, num_noisy=1)
    at, seeds = flat_index(masked, net.device), seed[masked].to(net.device)

    def head(parts: list[Tensor], weight: Tensor | None, bias: Tensor | None) -> Tensor:
        if len(at) == 0:  # FSDP needs the forward pass all the same
            return at
        rows = parts[0].flatten(0, -2)[at]
        options = {
            "temperature": config.rollout_temperature,
            "suppress_token": net.mask_token_id,
        }
        if weight is None:
            return ops.sample_tokens(rows, seeds, **options)[0]
        return ops.linear_sample_tokens(rows, weight, seeds, bias, **options)[0]

    was_training = net.training
    net.eval()  # the decoder has no dropout
    drawn = net(layout, [noisy_masked], clean, head)
    net.train(was_training)
    return noisy_masked.flatten().index_copy(0, at, drawn).view_as(noisy_masked)


def flat_index(chosen: Tensor, device: torch.device) -> Tensor:
    """Places of a CPU mask in the flattened tensor, on `device`: masking there would sync."""
    return chosen.flatten().nonzero().squeeze(1).to(device)


def summed(losses: Losses) -> Losses:
    return tuple(None if loss is None else loss.sum() for loss in losses)
