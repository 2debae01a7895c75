"""Per-token losses of the two passes to what the caller asked for; plain autograd throughout."""

import math
from typing import Any

import torch
from torch import Tensor

REDUCTIONS = ("none", "sum", "mean")


def autocast_operands(*operands: Tensor | None) -> tuple[Any, ...]:
    """Under autocast, its dtype for all of them, as ``nn.Linear`` would have them; else as is."""
    device_type = next(t.device.type for t in operands if t is not None)
    # PyTorch does not answer for the meta device, and up to 2.11 torch.compile cannot trace the
    # function that says for which devices it does
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return operands
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(None if t is None else t.to(dtype) for t in operands)


def _check_num_tokens(op: str, num_tokens: Tensor | float, reduction: str) -> None:
    if reduction != "mean":
        raise ValueError(f"{op}: num_tokens is for reduction 'mean', got {reduction!r}")
    got: object
    if isinstance(num_tokens, Tensor):  # its value stays on the device
        good, got = num_tokens.dim() == 0, f"shape {list(num_tokens.shape)}"
    else:
        good, got = 0 <= num_tokens < math.inf, num_tokens
    if not good:
        raise ValueError(
            f"{op}: num_tokens must be a number of at least 0 or a 0-D tensor, got {got}"
        )


def check_reduction(
    op: str,
    target: Tensor,
    token_weight: Tensor | None,
    reduction: str,
    num_tokens: Tensor | float | None,
    by_pass: bool = False,
) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"{op}: reduction must be one of {REDUCTIONS}, got {reduction!r}")
    if by_pass and reduction == "none":
        raise ValueError(f"{op}: by_pass is for the reductions 'sum' and 'mean', got 'none'")
    if token_weight is not None and token_weight.shape != target.shape:
        raise ValueError(
            f"{op}: token_weight must have target's shape {list(target.shape)}, "
            f"got {list(token_weight.shape)}"
        )
    if num_tokens is not None:
        _check_num_tokens(op, num_tokens, reduction)


def _divisor(
    target: Tensor, ignore_index: int, num_tokens: Tensor | float | None
) -> tuple[Tensor | float, Tensor]:
    """(n, or 1 if n is 0; whether it is 0): 0 / 0 would leave NaN in the gradient."""
    if num_tokens is None:
        num_tokens = (target != ignore_index).sum()
    if isinstance(num_tokens, Tensor):
        empty = num_tokens == 0
        return torch.where(empty, 1, num_tokens), empty.to(target.device)
    empty = torch.full((), num_tokens == 0, dtype=torch.bool, device=target.device)
    return num_tokens or 1, empty


def token_factors(
    target: Tensor,
    ignore_index: int,
    token_weight: Tensor | None,
    pass_weights: tuple[float, float],
    reduction: str,
    num_tokens: Tensor | float | None,
) -> tuple[tuple[Tensor | None, Tensor | None], Tensor | None]:
    """The reduction as (float32 factors [...] of each pass's losses, None for 1; whether the mean
    has no tokens, so that it is 0). ``reduction`` is "sum" or "mean".
    """
    divisor: Tensor | float = 1
    empty = None
    if reduction == "mean":
        divisor, empty = _divisor(target, ignore_index, num_tokens)

    def factor(pass_weight: float) -> Tensor | None:
        if token_weight is not None:
            return token_weight.float() * pass_weight / divisor
        if reduction == "sum" and pass_weight == 1.0:
            return None
        ones = torch.ones(target.shape, dtype=torch.float32, device=target.device)
        return ones * pass_weight / divisor

    return (factor(pass_weights[0]), factor(pass_weights[1])), empty


def reduce_loss(
    op: str,
    losses: tuple[Tensor | None, Tensor | None],
    target: Tensor,
    ignore_index: int,
    token_weight: Tensor | None,
    pass_weights: tuple[float, float],
    reduction: str,
    num_tokens: Tensor | float | None,
    by_pass: bool = False,
) -> Tensor | tuple[Tensor | None, Tensor | None]:
    """Weigh and reduce: ``loss = sum_pass w_pass sum_i w_i loss_pass[i] / n``.

    ``reduction="none"`` returns both passes' weighted losses [...] (None for an absent pass),
    ``"sum"`` one scalar with n = 1, ``"mean"`` one scalar with n = ``num_tokens``: by default the
    number of targets that are not ``ignore_index``; pass the global count, as a tensor or number,
    to average over data-parallel ranks. The mean of a batch without any is 0, and so are its
    gradients. With ``by_pass`` a scalar comes with float32 [2], without a gradient: the addends of
    the masked and of the predicted pass, 0 for an absent one.
    """
    check_reduction(op, target, token_weight, reduction, num_tokens, by_pass)

    def weigh(loss: Tensor | None, pass_weight: float) -> Tensor | None:
        if loss is None:
            return None
        if token_weight is not None:
            loss = loss * token_weight.to(loss.dtype)
        return loss if pass_weight == 1.0 else loss * pass_weight

    masked, predicted = map(weigh, losses, pass_weights)
    if reduction == "none":
        return masked, predicted
    present = [loss for loss in (masked, predicted) if loss is not None]
    total = sum(present[1:], present[0]).sum()

    def averaged(total: Tensor) -> Tensor:
        if reduction == "sum":
            return total
        if num_tokens is None and token_weight is None:  # without targets, every loss is 0 already
            return total / (target != ignore_index).sum().clamp(min=1)
        divisor, empty = _divisor(target, ignore_index, num_tokens)
        return (total / divisor).masked_fill(empty, 0.0)

    if not by_pass:
        return averaged(total)
    zero = torch.zeros_like(total.detach())
    addends = [zero if loss is None else loss.detach().sum() for loss in (masked, predicted)]
    return averaged(total), averaged(torch.stack(addends))
