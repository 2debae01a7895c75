"""The dual-pass loss of On-Policy Uniform Training, without a stored softmax."""

import torch
from torch import Tensor

from dmax_kernels.ops._register import (
    register_autograd,
    register_fake,
    register_in_place,
    register_not_differentiable,
)
from dmax_kernels.reduction import reduce_loss


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
    """Cross-entropy of the masked and of the predicted pass against the clean tokens (Eqs. 5-6).

    Per token and pass, with x = logits / ``temperature``, lse = log sum_v exp(x_v),
    s = ``label_smoothing``, z = ``z_loss``::

        loss = (1 - s) (lse - x_target) + s (lse - mean(x)) + z lse^2

    Args:
        logits_masked, logits_predicted: [..., V], float32, bfloat16 or float16, one shape and
            dtype; either may be None.
        target: int64 or int32 [...]; ``ignore_index`` rows use no logits and have loss and
            gradient 0. Another id outside [0, V) is an error on the CPU; on the GPU it makes that
            row's loss NaN.
        temperature: 1e-30 to 1e30. The paper has 1; a policy that was sampled at another
            temperature has its log-probabilities at that one.
        token_weight: float [...], multiplies both losses of a position.
        pass_weights: of the masked and the predicted pass.
        reduction: "none", "sum" or "mean" over both passes; mean divides by ``num_tokens``, by
            default the number of targets that are not ignored (a tensor or number gives the count
            over all data-parallel ranks). With a count of 0 the mean and its gradients are 0.
        by_pass: with a reduction, also return what each pass adds to the loss, for the log.

    Returns:
        reduction "none": (loss_masked, loss_predicted), float32 [...], None for an absent pass.
        Else one float32 scalar; with ``by_pass`` (scalar, float32 [2] without a gradient: the
        addends of the masked and of the predicted pass, 0 for an absent one). Differentiable once
        in both logits; the gradient is computed from the logits and lse, with one rounding to the
        logits' dtype.

    Raises:
        ValueError: an unknown reduction, a token_weight of a different shape, by_pass without a
            reduction.
        RuntimeError: wrong dtypes, shapes, devices, options or (CPU) targets.
    """
    loss_masked, loss_predicted, _, _ = torch.ops.dmax.oput_loss(
        logits_masked,
        logits_predicted,
        target,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        temperature=temperature,
    )
    losses = (
        None if logits_masked is None else loss_masked,
        None if logits_predicted is None else loss_predicted,
    )
    return reduce_loss(
        "oput_loss", losses, target, ignore_index, token_weight, pass_weights, reduction,
        num_tokens, by_pass,
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
    """Both losses, and the gradient in place of the logits: no second [..., V] tensor at all.

    ``logits[i] := grad[i] * d loss[i] / d logits[i]`` for each pass. For training loops that write
    their own backward pass; autograd does not see it.

    Args:
        logits_masked, logits_predicted, target, ignore_index, label_smoothing, z_loss, temperature:
            as in :func:`oput_loss`; the logits are overwritten.
        grad_masked, grad_predicted: float32 [...], the gradient of each token's loss; None for 1.

    Returns:
        (loss_masked, loss_predicted), float32 [...], None for an absent pass.

    Raises:
        RuntimeError: as :func:`oput_loss`; logits whose rows are not adjacent in memory, that share
            memory with another argument, or that require a gradient. Nothing is written then.
    """
    loss_masked, loss_predicted = torch.ops.dmax.oput_loss_and_grad_(
        logits_masked,
        logits_predicted,
        target,
        grad_masked,
        grad_predicted,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        temperature=temperature,
    )
    return (
        None if logits_masked is None else loss_masked,
        None if logits_predicted is None else loss_predicted,
    )


def _empty_loss(logits: Tensor | None, target: Tensor) -> Tensor:
    return target.new_empty((0,) if logits is None else target.shape, dtype=torch.float32)


@register_fake("oput_loss")
def _(logits_masked, logits_predicted, target, **options):
    losses = [_empty_loss(logits, target) for logits in (logits_masked, logits_predicted)]
    return (*losses, *(torch.empty_like(loss) for loss in losses))


@register_fake("oput_loss_backward")
def _(grad_loss, logits, target, logsumexp, **options):
    return logits.new_empty(logits.shape)


@register_fake("oput_loss_and_grad_")
def _(logits_masked, logits_predicted, target, grad_masked=None, grad_predicted=None, **options):
    return _empty_loss(logits_masked, target), _empty_loss(logits_predicted, target)


def _setup_context(ctx, inputs, options, output):
    logits_masked, logits_predicted, target = inputs
    _, _, logsumexp_masked, logsumexp_predicted = output
    ctx.options = options
    ctx.mark_non_differentiable(logsumexp_masked, logsumexp_predicted)
    ctx.save_for_backward(
        logits_masked, logits_predicted, target, logsumexp_masked, logsumexp_predicted
    )


def _backward(ctx, grad_loss_masked, grad_loss_predicted, *_):
    logits_masked, logits_predicted, target, logsumexp_masked, logsumexp_predicted = (
        ctx.saved_tensors
    )

    def grad_logits(needed, grad_loss, logits, logsumexp):
        if logits is None or not needed:
            return None
        return torch.ops.dmax.oput_loss_backward(
            grad_loss, logits, target, logsumexp, **ctx.options
        )

    needs_masked, needs_predicted, _ = ctx.needs_input_grad[:3]
    return (
        grad_logits(needs_masked, grad_loss_masked, logits_masked, logsumexp_masked),
        grad_logits(needs_predicted, grad_loss_predicted, logits_predicted, logsumexp_predicted),
        None,
    )


register_autograd("oput_loss", _backward, _setup_context)
register_not_differentiable("oput_loss_backward", "second derivatives are not there")
register_in_place("oput_loss_and_grad_")
