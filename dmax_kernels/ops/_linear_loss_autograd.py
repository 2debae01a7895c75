"""The gradients of linear_oput_loss: from its single losses, and those that come with its sum."""

import torch
from torch import Tensor

from dmax_kernels.ops._register import (
    register_autograd,
    register_in_place,
    register_not_differentiable,
)


def _setup_context(ctx, inputs, options, output):
    _, _, logsumexp_masked, logsumexp_predicted = output
    ctx.options = options
    ctx.mark_non_differentiable(logsumexp_masked, logsumexp_predicted)
    ctx.save_for_backward(*inputs, logsumexp_masked, logsumexp_predicted)


def _backward(ctx, grad_masked, grad_predicted, *_):
    *inputs, bias, logsumexp_masked, logsumexp_predicted = ctx.saved_tensors
    masked, predicted, weight, _, biased = ctx.needs_input_grad[:5]
    needed = (masked, predicted, weight, biased)
    grads = torch.ops.dmax.linear_oput_loss_backward(
        grad_masked,
        grad_predicted,
        *inputs,
        logsumexp_masked,
        logsumexp_predicted,
        bias,
        **ctx.options,
        needs_masked=needed[0],
        needs_predicted=needed[1],
        needs_weight=needed[2],
        needs_bias=needed[3],
    )
    *grads, grad_bias = (g if need else None for g, need in zip(grads, needed, strict=True))
    return *grads, None, grad_bias  # none for the target


def _setup_sum_context(ctx, inputs, options, output):
    _, _, logsumexp_masked, logsumexp_predicted, *grads = output
    ctx.options = {k: v for k, v in options.items() if not k.startswith("needs_")}
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # else zeros of the gradients' shapes come with grad_total
    ctx.save_for_backward(*inputs, logsumexp_masked, logsumexp_predicted)
    ctx.grads = grads  # not saved: the first backward pass gives them away


def _sum_backward(ctx, grad_total, *_):
    *inputs, bias, factor_masked, factor_predicted, lse_masked, lse_predicted = ctx.saved_tensors
    masked, predicted, weight, _, biased = ctx.needs_input_grad[:5]
    needed = (masked, predicted, weight, biased)
    grads, ctx.grads = ctx.grads, None
    if grads is None or torch.is_grad_enabled():
        # A second backward pass, or one that is to be differentiated: with a product more

        def grad_loss(factor, logsumexp):
            factor = torch.ones_like(logsumexp) if factor is None else factor
            return grad_total * factor

        grads = torch.ops.dmax.linear_oput_loss_backward(
            grad_loss(factor_masked, lse_masked),
            grad_loss(factor_predicted, lse_predicted),
            *inputs,
            lse_masked,
            lse_predicted,
            bias,
            **ctx.options,
            needs_masked=needed[0],
            needs_predicted=needed[1],
            needs_weight=needed[2],
            needs_bias=needed[3],
        )
    else:
        grads = [
            _times(g, grad_total) if need else g for g, need in zip(grads, needed, strict=True)
        ]
    *grads, grad_bias = (g if need else None for g, need in zip(grads, needed, strict=True))
    return *grads, None, grad_bias, None, None  # none for target and factors


def _times(grad, factor):
    if type(factor) is not Tensor:  # a trace, whose compiler chooses what is written in place
        return (grad * factor.to(torch.float32)).to(grad.dtype)
    torch.ops.dmax.linear_oput_loss_scale_(grad, factor)
    return grad


def register() -> None:
    register_autograd("linear_oput_loss", _backward, _setup_context)
    register_not_differentiable("linear_oput_loss_backward", "second derivatives are not there")
    register_autograd("linear_oput_loss_sum", _sum_backward, _setup_sum_context)
    register_in_place("linear_oput_loss_scale_")
