"""The dual-pass loss of On-Policy Uniform Training from the hidden states: no stored logits."""

import torch
from torch import Tensor

from dmax_kernels.reduction import reduce_loss


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
    token_weight: Tensor | None = None,
    pass_weights: tuple[float, float] = (1.0, 1.0),
    reduction: str = "none",
    num_tokens: Tensor | float | None = None,
) -> Tensor | tuple[Tensor | None, Tensor | None]:
    """:func:`dmax_kernels.oput_loss` of ``hidden @ weight.T + bias`` of both passes (Eq. 6).

    Args:
        hidden_masked, hidden_predicted: [..., D], float32, bfloat16 or float16, one shape and
            dtype; either may be None.
        weight: [V, D], the LM head, in hidden's dtype.
        target: int64 or int32 [...], as in :func:`dmax_kernels.oput_loss`.
        bias: [V] in hidden's dtype, or None.

    Returns:
        As :func:`dmax_kernels.oput_loss`.

    Raises:
        ValueError: an unknown reduction, a token_weight of another shape.
        RuntimeError: wrong dtypes, shapes, devices, options or (CPU) targets.
    """
    loss_masked, loss_predicted, _, _ = torch.ops.dmax.linear_oput_loss(
        hidden_masked, hidden_predicted, weight, target, bias=bias,
        ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss,
    )  # fmt: skip
    losses = (
        None if hidden_masked is None else loss_masked,
        None if hidden_predicted is None else loss_predicted,
    )
    return reduce_loss(
        "linear_oput_loss", losses, target, ignore_index, token_weight, pass_weights, reduction,
        num_tokens,
    )  # fmt: skip
