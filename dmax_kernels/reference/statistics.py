"""What decoding rules need of a row: top-1, runner-up, entropy and normaliser."""

from typing import Any

import torch
from torch import Tensor

from dmax_kernels.ops.statistics import RowStatistics
from dmax_kernels.reference.top1 import masked_logits, per_row, softmax_of


def row_statistics(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    suppress_token: int = -1,
    **visibility: Any,
) -> RowStatistics:
    visible = masked_logits("row_statistics", logits, suppress_token, **visibility)
    token = visible.argmax(dim=-1, keepdim=True)  # the first maximum; a NaN counts as the maximum
    temperature = per_row(temperature)
    probability = softmax_of(visible, temperature)
    confidence = probability.gather(-1, token)
    runner_up = probability.scatter(-1, token, 0.0).amax(dim=-1)
    return RowStatistics(
        token.squeeze(-1),
        confidence.squeeze(-1),
        torch.where(confidence.squeeze(-1).isnan(), torch.nan, runner_up),  # V = 1 has no other
        torch.special.entr(probability).sum(dim=-1),  # -p log p, 0 at p = 0
        torch.logsumexp(visible / temperature, dim=-1),
    )
