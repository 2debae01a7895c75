"""Tokens and losses from the hidden states and the LM head; here the logits are stored."""

from typing import Any

import torch
from torch import Tensor

from dmax_kernels.reduction import autocast_operands, reduce_loss
from dmax_kernels.reference.logprobs import TokenLogprobs, token_logprobs
from dmax_kernels.reference.loss import token_loss
from dmax_kernels.reference.sample import Sample, sample_tokens
from dmax_kernels.reference.top1 import top1_confidence


def linear_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """float32 logits: products and sums in float32, not rounded to the inputs' dtype."""
    logits = hidden.float() @ weight.float().t()
    return logits if bias is None else logits + bias.float()


def linear_top1_confidence(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float = 1.0,
    suppress_token: int = -1,
    **visibility: Any,
) -> tuple[Tensor, Tensor]:
    visibility |= {"temperature": temperature, "suppress_token": suppress_token}
    return top1_confidence(linear_logits(hidden, weight, bias), **visibility)


def linear_sample_tokens(
    hidden: Tensor,
    weight: Tensor,
    seed: Tensor,
    bias: Tensor | None = None,
    **options: Any,
) -> Sample:
    return sample_tokens(linear_logits(hidden, weight, bias), seed, **options)


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    bias: Tensor | None = None,
    **options: Any,
) -> TokenLogprobs:
    return token_logprobs(linear_logits(hidden, weight, bias), ids, **options)


def linear_oput_loss(
    hidden_masked: Tensor | None,
    hidden_predicted: Tensor | None,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
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
    hidden_masked, hidden_predicted, weight, bias = autocast_operands(
        hidden_masked, hidden_predicted, weight, bias
    )
    ignored = (target == ignore_index).unsqueeze(-1)

    def pass_loss(hidden: Tensor | None) -> Tensor | None:
        if hidden is None:
            return None
        # An ignored row's hidden state is not read: 0 times a NaN would reach weight's gradient
        with torch.autocast(weight.device.type, enabled=False):
            logits = linear_logits(torch.where(ignored, 0.0, hidden), weight, bias)
        return token_loss(logits, target, ignore_index, label_smoothing, z_loss, temperature)

    return reduce_loss(
        "linear_oput_loss", (pass_loss(hidden_masked), pass_loss(hidden_predicted)), target,
        ignore_index, token_weight, pass_weights, reduction, num_tokens, by_pass,
    )  # fmt: skip
