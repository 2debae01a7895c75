"""Log-probabilities of given tokens, their ranks, and the most likely tokens beside them."""

from typing import Any

import torch
from torch import Tensor

from dmax_kernels.ops.logprobs import TokenLogprobs
from dmax_kernels.reference.top1 import masked_logits


def token_logprobs(
    logits: Tensor,
    ids: Tensor,
    *,
    temperature: float = 1.0,
    top_n: int = 0,
    ignore_index: int = -100,
    **visibility: Any,
) -> TokenLogprobs:
    x = masked_logits("token_logprobs", logits, **visibility)
    one_per_row = ids.dim() == x.dim() - 1
    columns = (ids.unsqueeze(-1) if one_per_row else ids).long()
    ignored = columns == ignore_index
    # The softmax of a row with +inf is undefined: NaN, as in log_softmax
    logprobs = torch.log_softmax(x / temperature, dim=-1)

    # Every token's place in the order: NaN first, then the larger value, then the lower id
    values = x.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
    order = values.argsort(dim=-1, descending=True, stable=True)
    nan_last = (~x.isnan()).gather(-1, order).to(torch.int8)
    order = order.gather(-1, nan_last.argsort(dim=-1, stable=True))
    place = torch.empty_like(order).scatter_(-1, order, torch.arange(x.shape[-1]).expand_as(order))

    safe = torch.where(ignored, 0, columns)
    logprob = torch.where(ignored, 0.0, logprobs.gather(-1, safe))
    rank = torch.where(ignored, -1, place.gather(-1, safe))
    if one_per_row:
        logprob, rank = logprob.squeeze(-1), rank.squeeze(-1)
    top_ids = order[..., :top_n].contiguous()
    return TokenLogprobs(logprob, rank, top_ids, logprobs.gather(-1, top_ids).detach())
