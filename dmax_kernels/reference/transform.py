"""Logits as a sampler wants them: soft cap, bias and penalties."""

import torch
from torch import Tensor

from dmax_kernels.vocabulary import allowed_tokens


def per_row(operand: Tensor, rows: torch.Size) -> Tensor:
    """One row of numbers for all, one per block of positions, or one per row, as [..., n]."""
    if operand.numel() == operand.shape[-1]:
        return operand.reshape(-1)
    return operand if operand.shape[:-1] == rows else operand.unsqueeze(-2)


def transform_logits_(
    logits: Tensor,
    *,
    softcap: float = 0.0,
    bias: Tensor | None = None,
    output_counts: Tensor | None = None,
    prompt_tokens: Tensor | None = None,
    repetition_penalty: float | Tensor = 1.0,
    presence_penalty: float | Tensor = 0.0,
    frequency_penalty: float | Tensor = 0.0,
) -> Tensor:
    rows, vocab = logits.shape[:-1], logits.shape[-1]
    x = logits.float()
    if softcap > 0:
        x = torch.where(x.isinf(), x, softcap * torch.tanh(x / softcap))
    if bias is not None:
        x = x + per_row(bias, rows)
    count = torch.zeros(vocab, dtype=torch.int32, device=logits.device)
    if output_counts is not None:
        count = per_row(output_counts, rows)
    seen = count > 0
    if prompt_tokens is not None:
        seen = seen | allowed_tokens(per_row(prompt_tokens, rows), vocab)

    def of_row(penalty: float | Tensor) -> float | Tensor:
        return per_row(penalty.unsqueeze(-1), rows) if isinstance(penalty, Tensor) else penalty

    repetition = of_row(repetition_penalty)
    x = torch.where(seen, torch.where(x > 0, x / repetition, x * repetition), x)
    x = torch.where(count > 0, x - of_row(frequency_penalty) * count, x)
    x = torch.where(count > 0, x - of_row(presence_penalty), x)
    return logits.copy_(x)
