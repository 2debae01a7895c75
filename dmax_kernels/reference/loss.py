"""Eqs. 5-6: cross-entropy of the masked and of the predicted pass against the clean tokens."""

import torch
from torch import Tensor

from dmax_kernels.reduction import reduce_loss


def combined_loss(
    nll: Tensor, logsumexp: Tensor, mean_logit: Tensor | None, label_smoothing: float, z_loss: float
) -> Tensor:
    """``(1 - s) nll + s (lse - mean) + z lse^2``; without smoothing the mean may be None."""
    loss = nll
    if mean_logit is not None:
        loss = (1 - label_smoothing) * nll + label_smoothing * (logsumexp - mean_logit)
    if z_loss:
        loss = loss + z_loss * logsumexp.square()
    return loss


def token_loss(
    logits: Tensor, target: Tensor, ignore_index: int, label_smoothing: float, z_loss: float,
    temperature: float,
) -> Tensor:  # fmt: skip
    """Per-token loss of one pass, float32 [...]."""
    x = logits.float() / temperature
    keep = target != ignore_index
    safe_target = torch.where(keep, target, 0).long()
    logsumexp = x.logsumexp(dim=-1)
    # The softmax of a row with +inf is undefined: the loss is NaN, as in cross_entropy
    logsumexp = torch.where(logsumexp == torch.inf, torch.nan, logsumexp)
    nll = logsumexp - x.gather(-1, safe_target.unsqueeze(-1)).squeeze(-1)
    mean_logit = x.mean(dim=-1) if label_smoothing else None
    loss = combined_loss(nll, logsumexp, mean_logit, label_smoothing, z_loss)
    return torch.where(keep, loss, 0.0)


def oput_loss(
    logits_masked: Tensor | None,
    logits_predicted: Tensor | None,
    target: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    temperature: float = 1.0,
    token_weight: Tensor | None = None,
    pass_weights: tuple[float, float] = (1.0, 1.0),
    reduction: str = "none",
    num_tokens: Tensor | float | None = None,
    by_pass: bool = False,
) -> Tensor | tuple[Tensor | None, Tensor | None]:
    def pass_loss(logits: Tensor | None) -> Tensor | None:
        if logits is None:
            return None
        return token_loss(logits, target, ignore_index, label_smoothing, z_loss, temperature)

    return reduce_loss(
        "oput_loss", (pass_loss(logits_masked), pass_loss(logits_predicted)), target,
        ignore_index, token_weight, pass_weights, reduction, num_tokens, by_pass,
    )  # fmt: skip


def oput_loss_and_grad_(
    logits_masked: Tensor | None,
    logits_predicted: Tensor | None,
    target: Tensor,
    grad_masked: Tensor | None = None,
    grad_predicted: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    temperature: float = 1.0,
) -> tuple[Tensor | None, Tensor | None]:
    def loss_and_grad_(logits: Tensor | None, grad: Tensor | None) -> Tensor | None:
        if logits is None:
            return None
        with torch.enable_grad():
            leaf = logits.detach().float().requires_grad_()
            loss = token_loss(leaf, target, ignore_index, label_smoothing, z_loss, temperature)
            (grad_logits,) = torch.autograd.grad(
                loss, leaf, torch.ones_like(loss) if grad is None else grad
            )
        # An ignored row's gradient is 0 even where its logits are not finite
        ignored = (target == ignore_index).unsqueeze(-1)
        logits.copy_(grad_logits.masked_fill(ignored, 0.0))
        return loss.detach()

    return loss_and_grad_(logits_masked, grad_masked), loss_and_grad_(
        logits_predicted, grad_predicted
    )
