"""The sample of the whole vocabulary from the partial results of its shards."""

import torch
from torch import Tensor

from dmax_kernels.reference.top1_merge import shard_masses, winning_token


def sample_merge(
    maximum: Tensor,
    sum_exp: Tensor,
    token: Tensor,
    score: Tensor,
    weight: Tensor,
    *,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """[S, ...] each -> token [...], probability [...]."""
    sampled = winning_token(score, token)
    of_winner = torch.where(token.long() == sampled, shard_masses(maximum, weight, temperature), 0)
    total = shard_masses(maximum, sum_exp, temperature).sum(dim=0)
    best = maximum.amax(dim=0)
    probability = of_winner.amax(dim=0) / total
    return sampled, torch.where(best.isfinite(), probability, torch.nan)
