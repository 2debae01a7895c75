"""The top-1 of the whole vocabulary from the partial results of its shards."""

import torch
from torch import Tensor


def winning_token(value: Tensor, token: Tensor) -> Tensor:
    """The token of the largest value over the shards [S, ...]: NaN before all, ties lowest id."""
    best = value.amax(dim=0)  # a NaN wins
    wins = torch.where(best.isnan(), value.isnan(), value == best)
    return torch.where(wins, token.long(), torch.iinfo(torch.int64).max).amin(dim=0)


def shard_masses(maximum: Tensor, mass: Tensor, temperature: float) -> Tensor:
    """Masses relative to each shard's maximum [S, ...] -> relative to the largest maximum."""
    # exp(-inf - -inf) is NaN, but a shard without mass adds nothing beside one that has some
    factor = torch.exp((maximum - maximum.amax(dim=0)) / temperature)
    return mass.float() * torch.where(maximum == -torch.inf, 0.0, factor)


def top1_merge(
    maximum: Tensor, sum_exp: Tensor, token: Tensor, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """[S, ...] each -> token [...], confidence [...]."""
    total = shard_masses(maximum, sum_exp, temperature).sum(dim=0)
    confidence = torch.where(maximum.amax(dim=0) == -torch.inf, torch.nan, 1 / total)
    return winning_token(maximum, token), confidence
