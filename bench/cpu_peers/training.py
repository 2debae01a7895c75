"""Peers for training: the loss with its gradients."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import dmax_kernels
from bench.cpu_peers.registry import expert


def gradients_of(*names):
    def call(function, given):
        leaves = [given[name] for name in names]
        return lambda: torch.autograd.grad(function(**given), leaves)

    return call


@expert("oput_loss", "cross_entropy", compiled=True, call=gradients_of("masked", "predicted"))
def _(masked, predicted, target):
    return F.cross_entropy(masked, target) + F.cross_entropy(predicted, target)


@expert("oput_loss", "softmax minus one-hot")
def _(masked, predicted, target):
    return [softmax_minus_one_hot(x.detach(), target)[1] for x in (masked, predicted)]


def softmax_minus_one_hot(logits, target):
    """One pass: its losses and the gradient of their mean."""
    log_probability = logits.log_softmax(dim=-1, dtype=torch.float32)
    place = target.unsqueeze(-1)
    losses = -log_probability.gather(-1, place).squeeze(-1)
    grad = log_probability.exp_()
    grad.scatter_add_(-1, place, grad.new_full(place.shape, -1.0))
    return losses, grad.div_(len(target)).to(logits.dtype)


@expert("oput_loss_and_grad_", "softmax minus one-hot")
def _(masked, predicted, target, weight):
    found = []
    for x in (masked, predicted):
        losses, grad = softmax_minus_one_hot(x, target)
        x.copy_(grad)  # every weight is 1 / len(target)
        found.append(losses)
    return found


HEAD = gradients_of("masked", "predicted", "weight")


@expert("linear_oput_loss", "one concatenated pass", compiled=True, call=HEAD)
def _(masked, predicted, weight, target):
    logits = F.linear(torch.cat([masked, predicted]), weight)
    return 2 * F.cross_entropy(logits.float(), target.repeat(2))


@expert("linear_oput_loss", "products, then oput_loss", call=HEAD)
def _(masked, predicted, weight, target):
    logits = F.linear(torch.cat([masked, predicted]), weight).chunk(2)
    return dmax_kernels.oput_loss(*logits, target, reduction="mean")
