"""The objectives that On-Policy Uniform Training is compared with (the paper's Table 1).

`Uniform` is uniform diffusion (Eq. 2), `Mdlm` plain masked diffusion (Eq. 1), from which OPUT
starts, and `Certainty` dParallel's certainty forcing (arXiv 2509.26488).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dmax_kernels.ops.target_logprobs import TargetLogprobs
from dmax_kernels.reference.sample import MASK32, philox4x32
from dmax_kernels.training.corrupt import CorruptedBatch, TrainBatch, flat_index, step_generator
from dmax_kernels.training.oput import Losses, Objective, TwoPasses


class Uniform(TwoPasses):
    """Uniform diffusion: the second pass sees tokens drawn uniformly from the vocabulary (Eq. 2).

    Everything else is as in OPUT, which is how the paper trains this baseline (section 4.1): the
    masked pass beside it, cross-entropy at all positions of both. `recipe.passes` = "second" leaves
    Eq. 2 alone.
    """

    loss_names = ("loss_masked", "loss_uniform")

    def fill(self, corrupted: CorruptedBatch, noisy_masked: Tensor) -> Tensor:
        """x_t: at masked positions a token drawn uniformly from all but the mask token.

        As in the rollout, each position's draw follows from its own (seed, offset).
        """
        seed, offset = corrupted.seeds[:, corrupted.batch.start :].unbind(-1)
        counter = (offset & MASK32, offset >> 32, torch.zeros_like(offset), torch.ones_like(offset))
        word = philox4x32(counter, (seed & MASK32, (seed >> 32) & MASK32))[0]
        mask_id = self.net.mask_token_id
        drawn = (word * (self.net.vocabulary - 1)) >> 32
        drawn = drawn + (drawn >= mask_id).long()
        masked = corrupted.masks[0][:, corrupted.batch.start :]
        device = noisy_masked.device
        return torch.where(masked.to(device), drawn.to(device), noisy_masked)


class Mdlm(Objective):
    """Plain masked diffusion (Eq. 1), with two corruptions that share a pass over the clean tokens.

    With `recipe.mask_weight` "inverse", each masked position weighs 1/t, as in Eq. 1, and the sum
    is divided by the number of learnt positions. With "equal" all masked positions weigh the same
    and the sum is divided by their number, which has the same minimum and less variance.
    """

    loss_names: tuple[str, ...] = ("loss_masked",)
    NUM_CORRUPTIONS = 2

    def corrupt(self, batch: TrainBatch, seed: int, step: int) -> CorruptedBatch:
        generator = step_generator(seed, step)
        drawn = [self.recipe.draw_mask(batch, generator) for _ in range(self.NUM_CORRUPTIONS)]
        masks = [masked for masked, _ in drawn]
        learnt = batch.learnt[:, batch.start :]
        if self.recipe.mask_weight == "inverse":
            inverse = [torch.where(masked, 1 / level, 0.0) for masked, level in drawn]
            divisor, weights = self.recipe.average([learnt] * len(masks), inverse)
        else:
            divisor, weights = self.recipe.average([masked & learnt for masked in masks])
        return CorruptedBatch.from_start(batch, masks, generator, (True, False), divisor, weights)

    def forward(self, corrupted: CorruptedBatch) -> Losses:
        """-sum_i 1[x_t^i = MASK] log p(x_0^i | x_t) over both corruptions, weighed."""
        return self.masked_losses(*self.masked_positions(corrupted))

    def masked_positions(self, corrupted: CorruptedBatch) -> tuple[Tensor, Tensor, Tensor | None]:
        """States or logits [N, ...], target [N] and weight [N] of the masked positions."""
        batch = corrupted.batch
        target = batch.target[:, batch.start :]
        masks = torch.stack([each[:, batch.start :] for each in corrupted.masks])
        chosen = masks & batch.learnt[:, batch.start :]
        at = flat_index(chosen, batch.tokens.device)
        states = torch.stack(self.states(batch, self.masked_inputs(corrupted)))
        weight = None
        if corrupted.weights is not None:
            weight = torch.stack([each[:, batch.start :] for each in corrupted.weights])[chosen]
            weight = weight.to(at.device)
        return states.flatten(0, -2)[at], target.expand_as(chosen)[chosen].to(at.device), weight

    def masked_losses(self, states: Tensor, target: Tensor, weight: Tensor | None) -> Losses:
        total, _ = self.summed_losses(states, None, target, weight)
        return Losses(total, {"loss_masked": total.detach()})


class Certainty(Mdlm):
    """Certainty forcing: masked diffusion, plus beta times the entropy where it predicts right.

    The entropy is that of softmax(logits / T). dParallel averages it over the positions predicted
    right; here both terms are divided by the number of masked positions, so that micro batches and
    processes change nothing: the second term weighs beta times the share that is right.
    """

    loss_names = ("loss_masked", "loss_certainty")

    def masked_losses(self, states: Tensor, target: Tensor, weight: Tensor | None) -> Losses:
        cross_entropy, found = self.statistics(states, target)
        certainty = self.recipe.certainty_beta * torch.where(found.correct, found.entropy, 0.0)
        if weight is not None:
            cross_entropy, certainty = cross_entropy * weight, certainty * weight
        sums = {"loss_masked": cross_entropy.sum(), "loss_certainty": certainty.sum()}
        parts = {name: each.detach() for name, each in sums.items()}
        return Losses(sums["loss_masked"] + sums["loss_certainty"], parts)

    def statistics(self, states: Tensor, target: Tensor) -> tuple[Tensor, TargetLogprobs]:
        """-log p(target) at temperature 1, and what is asked at the entropy's temperature: [N]."""
        temperature = self.recipe.certainty_temperature
        head, bias = self.net.head()
        if head is None:
            found = self.ops.target_logprobs(states, target, temperature=temperature)
        else:
            found = self.ops.linear_target_logprobs(
                states, head, target, bias=bias, temperature=temperature
            )
        if temperature == 1:
            return -found.logprob, found
        if head is None:
            cross_entropy, _ = self.ops.oput_loss(states, None, target)
        else:
            cross_entropy, _ = self.ops.linear_oput_loss(states, None, head, target, bias=bias)
        return cross_entropy, found
