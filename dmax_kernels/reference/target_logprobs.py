"""Log-probability of given tokens, entropy and arg-max; certainty forcing. Plain autograd."""

import torch
from torch import Tensor

from dmax_kernels.ops.target_logprobs import TargetLogprobs
from dmax_kernels.reduction import autocast_operands, reduce_loss
from dmax_kernels.reference.linear import linear_logits


def target_logprobs(
    logits: Tensor, target: Tensor, *, temperature: float = 1.0, ignore_index: int = -100
) -> TargetLogprobs:
    ignored = target == ignore_index
    log_p = (logits.float() / temperature).log_softmax(dim=-1)
    place = target.masked_fill(ignored, 0).long().unsqueeze(-1)
    # exp(-inf) log(0) is 0 here, and so is its gradient
    terms = torch.where(log_p == -torch.inf, 0.0, log_p.exp() * log_p.clamp(min=-1e30))
    token = logits.argmax(dim=-1)
    return TargetLogprobs(
        torch.where(ignored, 0.0, log_p.gather(-1, place).squeeze(-1)),
        torch.where(ignored, 0.0, -terms.sum(dim=-1)),
        token.masked_fill(ignored, -1),
        (token == target) & ~ignored,
    )


def linear_target_logprobs(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
) -> TargetLogprobs:
    hidden, weight, bias = autocast_operands(hidden, weight, bias)
    ignored = (target == ignore_index).unsqueeze(-1)
    with torch.autocast(weight.device.type, enabled=False):
        logits = linear_logits(torch.where(ignored, 0.0, hidden), weight, bias)
    return target_logprobs(logits, target, temperature=temperature, ignore_index=ignore_index)


def certainty_forcing_loss(
    logits: Tensor,
    target: Tensor,
    *,
    beta: float = 1.0,
    temperature: float = 1.0,
    ignore_index: int = -100,
    token_weight: Tensor | None = None,
    reduction: str = "mean",
    num_tokens: Tensor | float | None = None,
) -> Tensor:
    options = {"ignore_index": ignore_index}
    cross_entropy = -target_logprobs(logits, target, **options).logprob
    found = target_logprobs(logits, target, temperature=temperature, **options)
    loss = cross_entropy + beta * torch.where(found.correct, found.entropy, 0.0)
    reduced = reduce_loss(
        "certainty_forcing_loss", (loss, None), target, ignore_index, token_weight, (1.0, 1.0),
        reduction, num_tokens,
    )  # fmt: skip
    each = reduced if isinstance(reduced, Tensor) else reduced[0]
    assert each is not None
    return each


def linear_certainty_forcing_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    beta: float = 1.0,
    temperature: float = 1.0,
    ignore_index: int = -100,
    token_weight: Tensor | None = None,
    reduction: str = "mean",
    num_tokens: Tensor | float | None = None,
) -> Tensor:
    hidden, weight, bias = autocast_operands(hidden, weight, bias)
    ignored = (target == ignore_index).unsqueeze(-1)
    with torch.autocast(weight.device.type, enabled=False):
        logits = linear_logits(torch.where(ignored, 0.0, hidden), weight, bias)
    return certainty_forcing_loss(
        logits, target, beta=beta, temperature=temperature, ignore_index=ignore_index,
        token_weight=token_weight, reduction=reduction, num_tokens=num_tokens,
    )  # fmt: skip
