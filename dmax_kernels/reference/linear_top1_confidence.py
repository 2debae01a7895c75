"""Most likely token and its probability, from the hidden state and the LM head."""

from torch import Tensor

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
) -> tuple[Tensor, Tensor]:
    logits = linear_logits(hidden, weight, bias)
    return top1_confidence(logits, temperature=temperature, suppress_token=suppress_token)
