"""The k most likely tokens and their probabilities."""

import torch
from torch import Tensor

from dmax_kernels.reference.top1 import softmax_of, visible_logits


def topk_confidence(
    logits: Tensor, k: int, *, temperature: float = 1.0, suppress_token: int = -1
) -> tuple[Tensor, Tensor]:
    visible = visible_logits(logits, suppress_token)
    # torch.topk leaves the order of ties open; a stable sort gives lowest id first, NaN before all
    tokens = torch.sort(visible, dim=-1, descending=True, stable=True).indices[..., :k]
    probability = softmax_of(visible, temperature)
    confidences = probability.gather(-1, tokens)
    broken = probability.isnan().any(dim=-1, keepdim=True)  # NaN, +inf, or nothing but -inf
    return tokens, torch.where(broken, torch.nan, confidences)
