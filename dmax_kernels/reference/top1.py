"""Most likely token and its probability."""

import torch
from torch import Tensor


def visible_logits(logits: Tensor, suppress_token: int) -> Tensor:
    """float32 logits with the suppressed token's column at -inf (never chosen, no mass)."""
    visible = logits.float()
    if suppress_token >= 0:
        visible = visible.clone()
        visible[..., suppress_token] = -torch.inf
    return visible


def softmax_of(visible: Tensor, temperature: float) -> Tensor:
    """softmax(visible / temperature); the difference comes first, or a common offset cancels."""
    return torch.softmax((visible - visible.amax(dim=-1, keepdim=True)) / temperature, dim=-1)


def top1_confidence(
    logits: Tensor, *, temperature: float = 1.0, suppress_token: int = -1
) -> tuple[Tensor, Tensor]:
    visible = visible_logits(logits, suppress_token)
    token = visible.argmax(dim=-1)  # the first maximum; a NaN counts as the maximum
    probability = softmax_of(visible, temperature)
    confidence = probability.gather(-1, token.unsqueeze(-1)).squeeze(-1)
    return token, confidence
