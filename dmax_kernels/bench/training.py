"""Workloads of training: the dual-pass loss, forward and backward of both passes, and a step."""

from __future__ import annotations

from itertools import islice

import torch
import torch.nn.functional as F

import dmax_kernels
from dmax_kernels.bench.workload import BLOCK, DIM, VOCAB, Inputs, Work, workload


def gradients(loss, leaves):
    return torch.autograd.grad(loss, leaves)


@workload
def oput_loss(inputs: Inputs, tokens: int = 64, vocab: int = VOCAB) -> Work:
    """Eager as in released training code: logits in float32, cross-entropy, autograd."""
    masked, predicted = (inputs.logits(tokens, vocab).requires_grad_() for _ in range(2))
    leaves = [masked, predicted]
    target = inputs.ids(tokens, below=vocab)
    return Work(
        {
            "eager": lambda: gradients(
                sum(F.cross_entropy(x.float(), target) for x in leaves), leaves
            ),
            "fused": lambda: gradients(
                dmax_kernels.oput_loss(masked, predicted, target, reduction="mean"), leaves
            ),
        },
        3 * sum(x.nbytes for x in leaves),  # read, read again for the gradient, write it
        given={"masked": masked, "predicted": predicted, "target": target},
        writes=True,
    )


@workload
def oput_loss_and_grad_(inputs: Inputs, tokens: int = 64, vocab: int = VOCAB) -> Work:
    """The gradients overwrite the logits; eager must not do that and copies them first."""
    start = [inputs.logits(tokens, vocab) for _ in range(2)]
    logits = masked, predicted = [x.clone() for x in start]
    target = inputs.ids(tokens, below=vocab)
    weight = torch.full((tokens,), 1 / tokens, dtype=torch.float32, device=inputs.device)

    def eager():
        leaves = [x.detach().requires_grad_() for x in logits]
        return gradients(sum(F.cross_entropy(x.float(), target) for x in leaves), leaves)

    def restore():
        for x, values in zip(logits, start, strict=True):
            x.copy_(values)

    return Work(
        {
            "eager": eager,
            "fused": lambda: dmax_kernels.oput_loss_and_grad_(
                masked, predicted, target, weight, weight
            ),
        },
        2 * sum(x.nbytes for x in logits),
        restore=restore,
        given={"masked": masked, "predicted": predicted, "target": target, "weight": weight},
        writes=True,
    )


@workload
def linear_oput_loss(inputs: Inputs, tokens: int = 256, dim: int = DIM, vocab: int = VOCAB) -> Work:
    """Eager as in released training code: the head's product per pass, then as for oput_loss."""
    hidden = masked, predicted = [inputs.normal(tokens, dim).requires_grad_() for _ in range(2)]
    weight = inputs.normal(vocab, dim, scale=dim**-0.5).requires_grad_()
    leaves = [*hidden, weight]
    target = inputs.ids(tokens, below=vocab)
    return Work(
        {
            "eager": lambda: gradients(
                sum(F.cross_entropy((h @ weight.t()).float(), target) for h in hidden), leaves
            ),
            "fused": lambda: gradients(
                dmax_kernels.linear_oput_loss(masked, predicted, weight, target, reduction="mean"),
                leaves,
            ),
        },
        2 * sum(x.nbytes for x in leaves),  # read, and their gradients written
        3 * 2 * (2 * tokens) * dim * vocab,  # what the gradients need, once
        inputs.dtype,
        given={"masked": masked, "predicted": predicted, "weight": weight, "target": target},
        writes=True,
    )


@workload
def oput_step(inputs: Inputs, sequences: int = 8) -> Work:
    """One step of On-Policy Uniform Training, rollout to optimizer, from the base checkpoint, in
    float32; as in spd_generate, the model's own passes take most of the time."""
    from dmax_kernels.models.checkpoint import load_checkpoint
    from dmax_kernels.ring_walk import task
    from dmax_kernels.ring_walk.data import ring_walk_examples
    from dmax_kernels.training.config import TrainConfig
    from dmax_kernels.training.loop import Trainer
    from dmax_kernels.training.parallel import Processes

    examples = list(islice(ring_walk_examples(8, BLOCK, seed=0), sequences))

    def step_with(ops):
        config = TrainConfig(steps=1, batch_size=sequences, ops=ops)
        model = load_checkpoint("base")[0]
        trainer = Trainer.build(
            model, config, task.EOS_ID, Processes(0, 1, torch.device(inputs.device))
        )

        def run():
            row = trainer.step(0, examples)
            return torch.tensor([row["loss_masked"], row["loss_predicted"], row["grad_norm"]])

        return run

    return Work({"eager": step_with("reference"), "fused": step_with("fused")})
