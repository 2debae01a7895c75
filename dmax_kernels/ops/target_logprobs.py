"""Log-probability of given tokens, entropy and arg-max, with gradients; certainty forcing from it.

Compositions of the ops, whose parts are in _logprob_blocks.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dmax_kernels.ops._logprob_blocks import FromHidden, FromLogits
from dmax_kernels.ops.linear import linear_oput_loss
from dmax_kernels.ops.loss import oput_loss
from dmax_kernels.reduction import autocast_operands, reduce_loss


class TargetLogprobs(NamedTuple):
    """What :func:`target_logprobs` returns, all of target's shape."""

    logprob: Tensor
    entropy: Tensor
    token: Tensor
    correct: Tensor


def target_logprobs(
    logits: Tensor, target: Tensor, *, temperature: float = 1.0, ignore_index: int = -100
) -> TargetLogprobs:
    """What policy gradients and distillation ask of each position, from one read of the logits.

    With ``x = logits / temperature`` and ``p = softmax(x)``::

        logprob = log p[target]          d logprob / d x_v = 1[v = target] - p_v
        entropy = -sum_v p_v log p_v     d entropy / d x_v = -p_v (log p_v + entropy)
        token   = argmax_v x_v           correct = (token == target)

    This is for training. Ranks, and the most likely tokens beside the target, as engines report
    them, come from :func:`token_logprobs`.

    Args:
        logits: [..., V], float32, bfloat16 or float16.
        target: int64 or int32 [...]; at ``ignore_index`` logprob, entropy and gradients are 0, the
            token is -1, and correct is False. Another id outside [0, V) is an error on the CPU; on
            the GPU logprob and gradients of its row are NaN.
        temperature: 1e-30 to 1e30.

    Returns:
        A named tuple :class:`TargetLogprobs` of logprob and entropy, float32 [...] and
        differentiable once, token int64 and correct bool. Logprob is within 2e-7 + 2e-6 relative of
        float64's. Rows that contain NaN or +inf, or nothing but -inf, have NaN for both.

    Raises:
        ValueError: logits, target or temperature of a wrong dtype, shape or range.
    """
    op = "target_logprobs"
    _check_rows(op, "logits", logits)
    check_target(op, "logits", logits, target, temperature, ignore_index, logits.shape[-1])
    return TargetLogprobs(*FromLogits.apply(logits, target, float(temperature), ignore_index))


def linear_target_logprobs(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
) -> TargetLogprobs:
    """:func:`target_logprobs` of ``hidden @ weight.T + bias``, whose logits are never all stored.

    Logits are float32 and exist for some columns of the vocabulary at a time: 32 MB of them, or
    4,096 columns of all rows if that is more. The backward pass computes them again.

    Args:
        hidden: [..., D], float32, bfloat16 or float16.
        weight: [V, D], the LM head, in hidden's dtype.
        bias: [V] in hidden's dtype, or None.
        target, temperature, ignore_index: as in :func:`target_logprobs`.

    Under autocast, hidden, weight and bias are cast to autocast's dtype, as ``nn.Linear`` does.

    Returns:
        As :func:`target_logprobs`; differentiable once in hidden, weight and bias. Gradients are
        summed in float32 and rounded once.

    Raises:
        ValueError: tensors of a wrong dtype or shape, a temperature or target out of range.
    """
    op = "linear_target_logprobs"
    hidden, weight, bias = autocast_operands(hidden, weight, bias)
    _check_rows(op, "hidden", hidden)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or len(weight) == 0:
        raise ValueError(
            f"{op}: weight must be [V, D] with D = {hidden.shape[-1]} as in hidden, "
            f"got {list(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{op}: bias must have shape [{len(weight)}], got {list(bias.shape)}")
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and t.dtype != hidden.dtype:
            raise ValueError(f"{op}: {name} must be {hidden.dtype} as hidden, got {t.dtype}")
    check_target(op, "hidden", hidden, target, temperature, ignore_index, len(weight))
    results = FromHidden.apply(hidden, weight, bias, target, float(temperature), ignore_index)
    return TargetLogprobs(*results)


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
    """Cross-entropy, and ``beta`` times the entropy where the model is right (arXiv 2509.26488).

    Per position, with ``p = softmax(logits)`` and H the entropy of softmax(logits / temperature)::

        loss = -log p[target] + beta 1[argmax = target] H

    dParallel averages its second term over the positions predicted right; here both terms have one
    divisor, so that micro batches and processes change nothing.

    Args:
        logits, target, ignore_index: as in :func:`target_logprobs`.
        beta: weight of the entropy.
        temperature: of the entropy alone.
        token_weight, reduction, num_tokens: as in :func:`dmax_kernels.oput_loss`.

    Returns:
        float32 [...] for reduction "none", else a scalar; differentiable once in the logits.

    Raises:
        ValueError: as :func:`target_logprobs` and :func:`dmax_kernels.oput_loss`.
    """
    found = target_logprobs(logits, target, temperature=temperature, ignore_index=ignore_index)
    nll: Tensor | None = -found.logprob
    if temperature != 1:
        nll, _ = oput_loss(logits, None, target, ignore_index=ignore_index)
    return _certainty(
        "certainty_forcing_loss", nll, found, beta, target, ignore_index, token_weight, reduction,
        num_tokens,
    )  # fmt: skip


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
    """:func:`certainty_forcing_loss` of ``hidden @ weight.T + bias``.

    With a temperature other than 1 the logits are computed for each of the two terms.

    Args:
        hidden, weight, bias: as in :func:`linear_target_logprobs`.
        target, beta, temperature, ignore_index, token_weight, reduction, num_tokens: as in
            :func:`certainty_forcing_loss`.

    Returns:
        As :func:`certainty_forcing_loss`; differentiable once in hidden, weight and bias.

    Raises:
        ValueError: as :func:`linear_target_logprobs` and :func:`dmax_kernels.oput_loss`.
    """
    found = linear_target_logprobs(
        hidden, weight, target, bias=bias, temperature=temperature, ignore_index=ignore_index
    )
    nll: Tensor | None = -found.logprob
    if temperature != 1:
        nll, _ = linear_oput_loss(
            hidden, None, weight, target, bias=bias, ignore_index=ignore_index
        )
    return _certainty(
        "linear_certainty_forcing_loss", nll, found, beta, target, ignore_index, token_weight,
        reduction, num_tokens,
    )  # fmt: skip


def _certainty(
    op, nll, found, beta, target, ignore_index, token_weight, reduction, num_tokens
) -> Tensor:
    loss = nll + beta * torch.where(found.correct, found.entropy, 0.0)
    reduced = reduce_loss(
        op, (loss, None), target, ignore_index, token_weight, (1.0, 1.0), reduction, num_tokens
    )
    each = reduced if isinstance(reduced, Tensor) else reduced[0]
    assert each is not None
    return each


def _check_rows(op: str, name: str, values: Tensor) -> None:
    if values.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"{op}: {name} must be float32, bfloat16 or float16, got {values.dtype}")
    if values.dim() < 1 or values.shape[-1] < 1:
        raise ValueError(f"{op}: {name} must have a last dimension, got {list(values.shape)}")


def check_target(
    op: str, name: str, values: Tensor, target: Tensor, temperature: float, ignore_index: int,
    vocab: int,
) -> None:  # fmt: skip
    """The target of the rows `values`, over `vocab` tokens, and the temperature."""
    if target.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{op}: target must be int64 or int32, got {target.dtype}")
    if target.shape != values.shape[:-1]:
        raise ValueError(
            f"{op}: target must have shape {list(values.shape[:-1])} (one token per row of "
            f"{name}), got {list(target.shape)}"
        )
    if not 1e-30 <= temperature <= 1e30:
        raise ValueError(f"{op}: temperature must be 1e-30 to 1e30, got {temperature:g}")
    if target.device.type != "cpu":
        return
    outside = (target != ignore_index) & ((target < 0) | (target >= vocab))
    if torch.compiler.is_compiling():  # a graph has no branch on a value
        need = f"{ignore_index} (ignore_index) or a token id of the vocabulary"
        torch._assert_async(~outside.any(), f"{op}: target must be {need}")
    elif outside.any():
        place = int(outside.flatten().nonzero()[0])
        raise ValueError(
            f"{op}: target must be {ignore_index} (ignore_index) or a token id in [0, {vocab}), "
            f"got {int(target.flatten()[place])} at position {place}"
        )
