"""One step of On-Policy Uniform Training (arXiv 2604.08302, section 3.1), from batch to losses.

`Oput` is the method, in four moves: `corrupt` masks the response, x_0 -> x^(m); `rollout` fills the
masks from the model, x^(m) -> x^(p) (Eq. 3); both sequences pass through the model in one packed
sequence (Eq. 4, see `layout.py`); each pass has a cross-entropy with x_0 (Eqs. 5 and 6). The
objectives that it is compared with are in `baselines.py`. Nothing here depends on the trainer.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dmax_kernels.training.corrupt import (
    IGNORE,
    CorruptedBatch,
    TrainBatch,
    block_mask,
    flat_index,
    step_generator,
    uniform_mask,
)
from dmax_kernels.training.layout import Layout


class Losses(NamedTuple):
    """What an objective returns for some rows, summed over their positions."""

    total: Tensor  # differentiable
    parts: dict[str, Tensor]  # what has been added up to it, by name, without gradients


@dataclass(frozen=True)
class Recipe:
    """What an objective leaves open; the fields of `TrainConfig` of these names explain them."""

    mask_level: str = "sequence"
    mask_ratio: tuple[float, float] = (0.75, 0.75)
    mask_weight: str = "equal"
    loss_average: str = "tokens"
    passes: str = "joint"
    share_masks: bool = False
    rollout_temperature: float = 1.0
    certainty_beta: float = 1.0
    certainty_temperature: float = 1.0

    def draw_mask(self, batch: TrainBatch, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The mask and its level t, [B, L - start] each."""
        editable = batch.editable[:, batch.start :]
        if self.mask_level == "block":
            return block_mask(editable, batch.block_length, generator)
        return uniform_mask(editable, self.mask_ratio, generator)

    def average(
        self, counted: list[Tensor], weights: list[Tensor] | None = None
    ) -> tuple[float, list[Tensor] | None]:
        """What the summed loss is divided by, and the weight of each position's loss.

        Args:
            counted: bool [B, W] of each corruption: the positions over which the loss is a mean.
            weights: float32 [B, W] of each, what these positions weigh in that mean; None for 1.
        """
        per_row = torch.stack(counted).sum((0, 2))
        if self.loss_average == "tokens":
            return float(per_row.sum()), weights
        share = (1 / per_row.clamp(min=1).float())[:, None]
        if weights is None:
            weights = [torch.ones(each.shape, dtype=torch.float32) for each in counted]
        return float((per_row > 0).sum()), [each * share for each in weights]


class Objective(nn.Module):
    """A model together with the loss that it is trained on.

    The loss owns the model, and its `forward` holds all that multiplies by the head's weight: under
    FSDP that weight is whole only inside the forward pass of the outermost module.

    Args:
        net: called as net(layout, noisy_parts, clean), it returns the hidden states or logits of
            each noisy part; `net.head()` returns the head's weight and bias, or None for both if
            these are logits. It has a `mask_token_id`, a `vocabulary` and a `device`. See
            `model.DenoisingModel`.
        ops: `dmax_kernels`, or `dmax_kernels.reference` for the same functions in plain PyTorch.
    """

    loss_names: tuple[str, ...]  # of the parts of what `forward` returns

    def __init__(self, net: Any, ops: ModuleType, recipe: Recipe | None = None) -> None:
        super().__init__()
        self.net = net
        self.ops = ops
        self.recipe = recipe or Recipe()

    def corrupt(self, batch: TrainBatch, seed: int, step: int) -> CorruptedBatch:
        """What is random in `step`; it follows from the seed, the step and the batch alone."""
        raise NotImplementedError

    def masked_inputs(self, corrupted: CorruptedBatch) -> list[Tensor]:
        """x^(m) of each corruption, int64 [B, W]: the W positions from `batch.start` on."""
        tokens, mask_id = corrupted.batch.tokens, self.net.mask_token_id
        masked = [each.to(tokens.device) for each in corrupted.masks]
        return [tokens.masked_fill(each, mask_id)[:, corrupted.batch.start :] for each in masked]

    def states(self, batch: TrainBatch, noisy_parts: list[Tensor]) -> list[Tensor]:
        """Hidden states or logits [B, W, ...] of noisy parts before shared clean tokens (Eq. 4)."""
        layout = Layout(batch.tokens.shape[1], batch.start, batch.block_length, len(noisy_parts))
        return self.net(layout, noisy_parts, batch.tokens)

    def summed_losses(
        self,
        masked_pass: Tensor | None,
        second_pass: Tensor | None,
        target: Tensor,
        token_weight: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The cross-entropy of both passes from states or logits [N, ...], summed over the N rows.

        Returns:
            the sum over both passes, which takes three products with the head where single losses
            take four; and what each pass adds to it, [2] without a gradient.
        """
        weight, bias = self.net.head()
        options: dict[str, Any] = {
            "token_weight": token_weight, "reduction": "sum", "by_pass": True
        }  # fmt: skip
        if weight is None:
            return self.ops.oput_loss(masked_pass, second_pass, target, **options)
        return self.ops.linear_oput_loss(
            masked_pass, second_pass, weight, target, bias=bias, **options
        )


class TwoPasses(Objective):
    """A masked pass, and a second pass over a sequence without masks: `fill` makes it.

    `recipe.passes` says which of them a step runs.
    """

    def corrupt(self, batch: TrainBatch, seed: int, step: int) -> CorruptedBatch:
        passes = {
            "joint": (True, True),
            "alternating": (step % 2 == 0, step % 2 == 1),
            "second": (False, True),
        }[self.recipe.passes]
        generator = step_generator(seed, step - step % 2 if self.recipe.share_masks else step)
        masked, _ = self.recipe.draw_mask(batch, generator)
        divisor, weights = self.recipe.average([batch.learnt[:, batch.start :]])
        return CorruptedBatch.from_start(batch, [masked], generator, passes, divisor, weights)

    def forward(self, corrupted: CorruptedBatch) -> Losses:
        """-sum_i log p(x_0^i | x) of each pass that runs (Eqs. 2 and 5).

        Both sums run over all learnt positions, masked or not. Only those go through the head.
        """
        batch = corrupted.batch
        (noisy_masked,) = self.masked_inputs(corrupted)
        masked_pass_runs, second_pass_runs = corrupted.passes
        noisy_parts = [noisy_masked] if masked_pass_runs else []
        if second_pass_runs:
            noisy_parts.append(self.fill(corrupted, noisy_masked))
        target = batch.target[:, batch.start :]
        learnt = target != IGNORE
        at = flat_index(learnt, batch.tokens.device)
        states = [part.flatten(0, -2)[at] for part in self.states(batch, noisy_parts)]
        weights = corrupted.weights
        total, by_pass = self.summed_losses(
            states[0] if masked_pass_runs else None,
            states[-1] if second_pass_runs else None,
            target[learnt].to(at.device),
            None if weights is None else weights[0][:, batch.start :][learnt].to(at.device),
        )
        named = zip(self.loss_names, by_pass, corrupted.passes, strict=True)
        return Losses(total, {name: loss for name, loss, runs in named if runs})

    def fill(self, corrupted: CorruptedBatch, noisy_masked: Tensor) -> Tensor:
        """The second pass's sequence, int64 [B, W], which equals x^(m) where that is no mask."""
        raise NotImplementedError


class Oput(TwoPasses):
    """On-Policy Uniform Training (Eqs. 3-6): the second pass sees the model's own predictions."""

    loss_names = ("loss_masked", "loss_predicted")

    @torch.no_grad()
    def fill(self, corrupted: CorruptedBatch, noisy_masked: Tensor) -> Tensor:
        """The rollout: the predicted sequence x^(p), int64 [B, W] (Eq. 3).

        x^(p) equals x^(m) where that is not a mask; elsewhere it is drawn from p_theta(. | x^(m))
        with the parameters of this very step. The head runs at masked positions only and never
        predicts a mask. Each position has its own (seed, offset): no draw depends on the others.
        """
        batch = corrupted.batch
        masked = corrupted.masks[0][:, batch.start :]
        at = flat_index(masked, noisy_masked.device)
        was_training = self.net.training
        self.net.eval()  # without dropout, as in the decoder
        (states,) = self.states(batch, [noisy_masked])
        self.net.train(was_training)
        if len(at) == 0:  # only now: under FSDP every process must have run the layers
            return noisy_masked
        states = states.flatten(0, -2)[at]
        seeds = corrupted.seeds[:, batch.start :][masked].to(at.device)
        options = {
            "temperature": self.recipe.rollout_temperature,
            "suppress_token": self.net.mask_token_id,
        }
        weight, bias = self.net.head()
        if weight is None:
            drawn = self.ops.sample_tokens(states, seeds, **options).token
        else:
            drawn = self.ops.linear_sample_tokens(states, weight, seeds, bias, **options).token
        return noisy_masked.flatten().index_copy(0, at, drawn).view_as(noisy_masked)
