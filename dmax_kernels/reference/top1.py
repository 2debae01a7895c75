"""The most likely tokens of every row and their probabilities, whole or from vocabulary shards."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dmax_kernels.vocabulary import allowed_tokens, visible_rows, visible_shard


def visible_logits(logits: Tensor, suppress_token: int, allowed: Tensor | None = None) -> Tensor:
    """float32 logits, -inf (never chosen, no mass) at the suppressed token and where the mask's bit
    is not set.
    """
    visible = logits.float()
    if suppress_token >= 0:
        visible = visible.clone()
        visible[..., suppress_token] = -torch.inf
    if allowed is not None:
        visible = visible.masked_fill(~allowed_tokens(allowed, logits.shape[-1]), -torch.inf)
    return visible


def masked_logits(op: str, logits: Tensor, suppress_token: int = -1, **visibility: Any) -> Tensor:
    """visible_logits() for an op's suppress_tokens, allowed and vocab_limit."""
    return visible_logits(*visible_rows(op, logits, suppress_token, **visibility))


def per_row(temperature: float | Tensor) -> float | Tensor:
    """A temperature that divides logits [..., V]."""
    return temperature.unsqueeze(-1) if isinstance(temperature, Tensor) else temperature


def softmax_of(visible: Tensor, temperature: float | Tensor) -> Tensor:
    """softmax(visible / temperature). Subtracting first keeps full precision under an offset."""
    return torch.softmax((visible - visible.amax(dim=-1, keepdim=True)) / temperature, dim=-1)


def top1_confidence(
    logits: Tensor, *, temperature: float = 1.0, suppress_token: int = -1, **visibility: Any
) -> tuple[Tensor, Tensor]:
    visible = masked_logits("top1_confidence", logits, suppress_token, **visibility)
    token = visible.argmax(dim=-1)  # the first maximum; a NaN counts as the maximum
    probability = softmax_of(visible, temperature)
    confidence = probability.gather(-1, token.unsqueeze(-1)).squeeze(-1)
    return token, confidence


def topk_confidence(
    logits: Tensor, k: int, *, temperature: float = 1.0, suppress_token: int = -1, **visibility: Any
) -> tuple[Tensor, Tensor]:
    visible = masked_logits("topk_confidence", logits, suppress_token, **visibility)
    # torch.topk leaves the order of ties open; a stable sort gives lowest id first, NaN before all
    tokens = torch.sort(visible, dim=-1, descending=True, stable=True).indices[..., :k]
    probability = softmax_of(visible, temperature)
    confidences = probability.gather(-1, tokens)
    broken = probability.isnan().any(dim=-1, keepdim=True)  # NaN, +inf, or nothing but -inf
    return tokens, torch.where(broken, torch.nan, confidences)


def local_suppress_token(logits_shard: Tensor, vocab_start: int, suppress_token: int) -> int:
    """The suppressed id's place on the shard, -1 where it lies elsewhere."""
    local = suppress_token - vocab_start
    return local if suppress_token >= 0 and 0 <= local < logits_shard.shape[-1] else -1


def top1_partial(
    logits_shard: Tensor,
    vocab_start: int,
    *,
    temperature: float = 1.0,
    suppress_token: int = -1,
    **visibility: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    suppress_token, allowed = visible_shard(
        "top1_partial", logits_shard, vocab_start, suppress_token, **visibility
    )
    local = local_suppress_token(logits_shard, vocab_start, suppress_token)
    visible = visible_logits(logits_shard, local, allowed)
    local_token = visible.argmax(dim=-1, keepdim=True)
    largest = visible.gather(-1, local_token)
    sum_exp = torch.exp((visible - largest) / temperature).sum(dim=-1)
    maximum = largest.squeeze(-1)
    # exp(-inf - -inf) is NaN, but a shard of nothing but -inf holds no mass
    sum_exp = torch.where(maximum == -torch.inf, 0.0, sum_exp)
    return maximum, sum_exp, local_token.squeeze(-1) + vocab_start


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
