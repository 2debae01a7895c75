"""Algorithm 1, lines 5-8: which masked positions become token positions."""

import torch
from torch import Tensor


def prefix_promote(
    confidence: Tensor, masked: Tensor, threshold: float | Tensor, *, inclusive: bool = False
) -> Tensor:
    # A NaN passes neither
    passes = confidence >= threshold if inclusive else confidence > threshold
    failed_before = (masked & ~passes).cumsum(dim=-1) > 0
    prefix = masked & ~failed_before
    leftmost = masked & (masked.cumsum(dim=-1) == 1)
    return torch.where(prefix.any(dim=-1, keepdim=True), prefix, leftmost)
