"""The top-1 of the whole vocabulary from the partial results of its shards."""

import torch
from torch import Tensor


def top1_merge(maximum: Tensor, sum_exp: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
    """[S, ...] each -> token [...], confidence [...]."""
    best = maximum.amax(dim=0)  # a NaN wins
    wins = torch.where(best.isnan(), maximum.isnan(), maximum == best)
    merged_token = torch.where(wins, token.long(), torch.iinfo(torch.int64).max).amin(dim=0)
    # exp(-inf - -inf) is NaN, but a shard without mass adds nothing beside one that has some
    factor = torch.where(maximum == -torch.inf, 0.0, torch.exp(maximum - best))
    total = (sum_exp.float() * factor).sum(dim=0)
    return merged_token, torch.where(best == -torch.inf, torch.nan, 1 / total)
