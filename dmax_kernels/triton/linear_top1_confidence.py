"""top1_confidence(hidden @ weight^T + bias) without stored logits."""

import torch
from torch import Tensor

from dmax_kernels.triton.launch import device_of, row_view
from dmax_kernels.triton.linear_rows import linear_statistics
from dmax_kernels.triton.stats import Partials, softmax_scale
from dmax_kernels.triton.top1 import merge_top1


def linear_top1_confidence(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float = 1.0,
    suppress_token: int = -1,
) -> tuple[Tensor, Tensor]:
    shape, device = hidden.shape[:-1], hidden.device
    token = torch.empty(shape, dtype=torch.int64, device=device)
    confidence = torch.empty(shape, dtype=torch.float32, device=device)
    if token.numel() == 0:
        return token, confidence
    bias = None if bias is None else bias.contiguous()
    with device_of(hidden):
        for some, partials in linear_statistics(
            row_view(hidden), row_view(weight), bias, temperature, suppress_token
        ):
            merge_top1(
                Partials(*partials[:3], partials.num_groups), softmax_scale(temperature),
                token.view(-1)[some], confidence.view(-1)[some],
            )  # fmt: skip
    return token, confidence
