"""One step of On-Policy Uniform Training (arXiv 2604.08302, section 3.1), from batch to losses.

`Oput` is the method, in four moves: `corrupt` masks the response, x_0 -> x^(m); `rollout` fills the
masks from the model, x^(m) -> x^(p) (Eq. 3); both sequences pass through the model in one packed
sequence (Eq. 4, see `layout.py`); each pass has a cross-entropy with x_0 (Eqs. 5 and 6). `Mdlm` is
plain masked diffusion (Eq. 1), from which OPUT starts. Nothing here depends on the trainer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dmax_kernels.training.layout import Layout

IGNORE = -100  # the target at a position whose token is not learnt
Losses = tuple[Tensor | None, Tensor | None]  # of the masked and the predicted pass; None: not run


@dataclass(frozen=True)
class TrainBatch:
    """Clean tokens x_0 in whole blocks of K positions: [prompt | response | eos ... | eos ...].

    Rows differ in length. A row's own last block is filled with end-of-sequence tokens, as the
    decoder fills it. The blocks after it are padding, which no token of the row attends to because
    attention is causal between blocks. Padding therefore needs no mask.
    """

    tokens: Tensor  # int64 [B, L]
    editable: Tensor  # bool [B, L]: response and tail, which may be masked; never the prompt
    target: Tensor  # int64 [B, L]: the token where it is learnt, elsewhere IGNORE
    block_length: int  # K

    @property
    def start(self) -> int:
        """The first position of the first block in which any row may be masked."""
        first = int(self.editable.any(0).nonzero()[0])
        return first // self.block_length * self.block_length

    def rows(self, index: Sequence[int], device: torch.device) -> TrainBatch:
        """These rows up to the last block in which any of them may be masked; tokens on `device`.

        The other tensors stay on the CPU, where they are turned into indices without a sync.
        """
        chosen = torch.as_tensor(index)
        last = int(self.editable[chosen].any(0).nonzero()[-1])
        end = (last // self.block_length + 1) * self.block_length
        return TrainBatch(
            self.tokens[chosen, :end].to(device),
            self.editable[chosen, :end],
            self.target[chosen, :end],
            self.block_length,
        )


# Corruption: which positions become the mask token. A prompt never does.


def uniform_mask(
    editable: Tensor, ratio: tuple[float, float], generator: torch.Generator
) -> Tensor:
    """Masks editable positions with probability t ~ Uniform(t_l, t_h), one t per row (Sec. 3.1).

    Args:
        editable: bool [B, L]; False (a prompt) is never masked.
        ratio: (t_l, t_h), 0 <= t_l <= t_h <= 1. Equal bounds give a fixed ratio.
    """
    low, high = ratio
    if not 0 <= low <= high <= 1:
        raise ValueError(f"uniform_mask: ratio must satisfy 0 <= low <= high <= 1, got {ratio}")
    options: dict[str, Any] = {"generator": generator, "dtype": torch.float32}
    level = low + (high - low) * torch.rand(editable.shape[0], 1, **options)
    return (torch.rand(editable.shape, **options) < level) & editable


def block_mask(editable: Tensor, block_length: int, generator: torch.Generator) -> Tensor:
    """Masks m positions of every block, with m drawn from 1..K for each block: t in {1..K}/K.

    Args:
        editable: bool [B, L], L a multiple of `block_length` K; False (a prompt) is never masked.

    Returns:
        bool [B, L]. In a block with E < K editable positions, ceil(m E / K) of them are masked.
    """
    rows, length = editable.shape
    if length % block_length != 0:
        raise ValueError(
            f"block_mask: editable must hold whole blocks of {block_length} positions, got {length}"
        )
    blocks = editable.view(rows, -1, block_length)
    shape = blocks.shape
    drawn = torch.randint(1, block_length + 1, (*shape[:2], 1), generator=generator)
    count = (drawn * blocks.sum(-1, keepdim=True) + block_length - 1) // block_length
    # Put the positions in random order, the editable ones first, and mask the first `count`.
    score = torch.rand(shape, generator=generator, dtype=torch.float32).masked_fill(~blocks, 2.0)
    rank = score.argsort(-1).argsort(-1)
    return ((rank < count) & blocks).view(rows, length)


@dataclass(frozen=True)
class CorruptedBatch:
    """A batch with everything that is random in its step.

    All of it is drawn for the whole batch, before the batch is divided into rows. Neither micro
    batches nor the number of processes therefore change what is masked or what the rollout draws.
    """

    batch: TrainBatch
    masks: tuple[Tensor, ...]  # bool [B, L] each: one per corruption
    seeds: Tensor  # int64 [B, L, 2]: (seed, offset) of the rollout's draw at each position
    passes: tuple[bool, bool]  # whether the masked and the predicted pass run in this step
    num_learnt: int  # positions over which the loss is averaged, in the whole batch

    @classmethod
    def from_start(
        cls,
        batch: TrainBatch,
        masks: Sequence[Tensor],
        generator: torch.Generator,
        passes: tuple[bool, bool],
        num_learnt: int,
    ) -> CorruptedBatch:
        """Completes masks [B, L - start], drawn for the positions from `batch.start` on."""
        key = torch.randint(2**62, (), generator=generator)
        offset = torch.arange(masks[0].numel()).view(masks[0].shape)
        seeds = torch.stack([key.expand_as(offset), offset], dim=-1)
        return cls(
            batch,
            tuple(F.pad(masked, (batch.start, 0)) for masked in masks),
            F.pad(seeds, (0, 0, batch.start, 0)),
            passes,
            num_learnt,
        )

    def rows(self, index: Sequence[int], device: torch.device) -> CorruptedBatch:
        """These rows, see `TrainBatch.rows`."""
        batch, chosen = self.batch.rows(index, device), torch.as_tensor(index)
        kept = chosen, slice(batch.tokens.shape[1])
        masks = tuple(masked[kept] for masked in self.masks)
        return CorruptedBatch(batch, masks, self.seeds[kept], self.passes, self.num_learnt)


# Rollout, passes and losses


class Objective(nn.Module):
    """A model together with the loss that it is trained on.

    The loss owns the model, and its `forward` holds all that multiplies by the head's weight: under
    FSDP that weight is whole only inside the forward pass of the outermost module.

    Args:
        net: called as net(layout, noisy_parts, clean), it returns the hidden states or logits of
            each noisy part; `net.head()` returns the head's weight and bias, or None for both if
            these are logits. It has a `mask_token_id` and a `device`. See `model.DenoisingModel`.
        ops: `dmax_kernels`, or `dmax_kernels.reference` for the same functions in plain PyTorch.
    """

    def __init__(self, net: Any, ops: ModuleType) -> None:
        super().__init__()
        self.net = net
        self.ops = ops

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
        self, masked_pass: Tensor | None, predicted_pass: Tensor | None, target: Tensor
    ) -> Losses:
        """The cross-entropy of each pass from states or logits [N, ...], summed over the N rows."""
        weight, bias = self.net.head()
        if weight is None:
            losses = self.ops.oput_loss(masked_pass, predicted_pass, target)
        else:
            losses = self.ops.linear_oput_loss(
                masked_pass, predicted_pass, weight, target, bias=bias
            )
        return tuple(None if loss is None else loss.sum() for loss in losses)


class Oput(Objective):
    """On-Policy Uniform Training (Eqs. 3-6).

    Args:
        mask_ratio: (t_l, t_h) of `uniform_mask`.
        rollout_temperature: 1 samples the rollout as in the paper; 0 is greedy, as released.
        alternating: run the masked pass in even steps and the predicted one in odd steps, rather
            than both in every step.
    """

    def __init__(
        self,
        net: Any,
        ops: ModuleType,
        *,
        mask_ratio: tuple[float, float] = (0.75, 0.75),
        rollout_temperature: float = 1.0,
        alternating: bool = False,
    ) -> None:
        super().__init__(net, ops)
        self.mask_ratio = mask_ratio
        self.rollout_temperature = rollout_temperature
        self.alternating = alternating

    def corrupt(self, batch: TrainBatch, seed: int, step: int) -> CorruptedBatch:
        generator = step_generator(seed, step)
        masked = uniform_mask(batch.editable[:, batch.start :], self.mask_ratio, generator)
        passes = (step % 2 == 0, step % 2 == 1) if self.alternating else (True, True)
        num_learnt = int((batch.target != IGNORE).sum())
        return CorruptedBatch.from_start(batch, [masked], generator, passes, num_learnt)

    def forward(self, corrupted: CorruptedBatch) -> Losses:
        """-sum_i log p(x_0^i | x^(m)) and -sum_i log p(x_0^i | x^(p)) (Eq. 5).

        Both sums run over all learnt positions, masked or not. Only those go through the head.
        """
        batch = corrupted.batch
        (noisy_masked,) = self.masked_inputs(corrupted)
        masked_pass_runs, predicted_pass_runs = corrupted.passes
        noisy_parts = [noisy_masked] if masked_pass_runs else []
        if predicted_pass_runs:
            noisy_parts.append(self.rollout(corrupted, noisy_masked))
        target = batch.target[:, batch.start :]
        learnt = target != IGNORE
        at = flat_index(learnt, batch.tokens.device)
        states = [part.flatten(0, -2)[at] for part in self.states(batch, noisy_parts)]
        return self.summed_losses(
            states[0] if masked_pass_runs else None,
            states[-1] if predicted_pass_runs else None,
            target[learnt].to(at.device),
        )

    @torch.no_grad()
    def rollout(self, corrupted: CorruptedBatch, noisy_masked: Tensor) -> Tensor:
        """The predicted sequence x^(p), int64 [B, W] (Eq. 3).

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
            "temperature": self.rollout_temperature, "suppress_token": self.net.mask_token_id
        }  # fmt: skip
        weight, bias = self.net.head()
        if weight is None:
            drawn = self.ops.sample_tokens(states, seeds, **options).token
        else:
            drawn = self.ops.linear_sample_tokens(states, weight, seeds, bias, **options).token
        return noisy_masked.flatten().index_copy(0, at, drawn).view_as(noisy_masked)


class Mdlm(Objective):
    """Plain masked diffusion (Eq. 1), with two corruptions that share a pass over the clean tokens.

    Each block draws its own t. Eq. 1 weighs a block's sum by 1/t. Here all masked positions weigh
    the same, which has the same minimum and less variance (at t = 1/K the weight would be K).
    """

    NUM_CORRUPTIONS = 2

    def corrupt(self, batch: TrainBatch, seed: int, step: int) -> CorruptedBatch:
        generator = step_generator(seed, step)
        start = batch.start
        masks = [
            block_mask(batch.editable[:, start:], batch.block_length, generator)
            for _ in range(self.NUM_CORRUPTIONS)
        ]
        learnt = batch.target[:, start:] != IGNORE
        num_learnt = sum(int((masked & learnt).sum()) for masked in masks)
        return CorruptedBatch.from_start(batch, masks, generator, (True, False), num_learnt)

    def forward(self, corrupted: CorruptedBatch) -> Losses:
        """-sum_i 1[x_t^i = MASK] log p(x_0^i | x_t) over both corruptions."""
        batch = corrupted.batch
        target = batch.target[:, batch.start :]
        learnt = torch.stack([each[:, batch.start :] for each in corrupted.masks])
        learnt = learnt & (target != IGNORE)
        at = flat_index(learnt, batch.tokens.device)
        states = torch.stack(self.states(batch, self.masked_inputs(corrupted)))
        return self.summed_losses(
            states.flatten(0, -2)[at], None, target.expand_as(learnt)[learnt].to(at.device)
        )


def step_generator(seed: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def flat_index(chosen: Tensor, device: torch.device) -> Tensor:
    """Indices, on `device`, of the True entries of a CPU mask that is flattened.

    Indexing with a mask on a GPU would wait for the GPU to count its entries.
    """
    return chosen.flatten().nonzero().squeeze(1).to(device)
