"""Sampling by the Gumbel-max rule, with noise from a counter-based generator (Philox4x32-10)."""

import torch
from torch import Tensor

from dmax_kernels.reference.top1 import (
    local_suppress_token,
    shard_masses,
    softmax_of,
    top1_confidence,
    top1_partial,
    visible_logits,
    winning_token,
)

MASK32 = 0xFFFFFFFF
PHILOX_MULTIPLIER = (0xD2511F53, 0xCD9E8D57)
PHILOX_KEY_STEP = (0x9E3779B9, 0xBB67AE85)


def philox4x32(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Ten rounds of Philox4x32 on int64 tensors that hold 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # int64 products wrap, which leaves all 64 bits of the unsigned product in place
        product0, product1 = c0 * PHILOX_MULTIPLIER[0], c2 * PHILOX_MULTIPLIER[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) & MASK32) ^ c1 ^ k0,
            product1 & MASK32,
            ((product0 >> 32) & MASK32) ^ c3 ^ k1,
            product0 & MASK32,
        )
        k0, k1 = (k0 + PHILOX_KEY_STEP[0]) & MASK32, (k1 + PHILOX_KEY_STEP[1]) & MASK32
    return c0, c1, c2, c3


def exponential_noise(
    seed: Tensor, shape: torch.Size, vocab_size: int, first_id: int = 0
) -> Tensor:
    """Exp(1) noise [..., V] of the ids from first_id on: the same (seed, offset, row, id) gives the
    same number everywhere.
    """
    num_rows = shape.numel()
    if seed.dim() == 1:  # one (seed, offset) for all: the row is part of the counter
        pairs = seed.expand(num_rows, 2)
        row = torch.arange(num_rows, device=seed.device)
    else:  # one per row: a draw does not depend on the row's place in the batch
        pairs = seed.reshape(num_rows, 2)
        row = torch.zeros(num_rows, dtype=torch.int64, device=seed.device)
    seed_r, offset_r = pairs[:, 0:1], pairs[:, 1:2]
    # Four ids share a counter; a shard may begin and end inside such a group
    groups = range(first_id // 4, (first_id + vocab_size + 3) // 4)
    group = torch.arange(groups.start, groups.stop, device=seed.device).expand(num_rows, -1)
    words = philox4x32(
        (
            group,
            row.unsqueeze(1).expand_as(group),
            (offset_r & MASK32).expand_as(group),
            ((offset_r >> 32) & MASK32).expand_as(group),
        ),
        (seed_r & MASK32, (seed_r >> 32) & MASK32),
    )
    word = torch.stack(words, dim=-1).flatten(1)
    word = word.narrow(1, first_id % 4, vocab_size)
    # Small v carries the race's winner, and keeps its full precision near 0
    v = ((word.float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)
    return -torch.log1p(-v).reshape(*shape, vocab_size)


def sample_tokens(
    logits: Tensor, seed: Tensor, *, temperature: float = 1.0, suppress_token: int = -1
) -> tuple[Tensor, Tensor]:
    if temperature == 0:
        return top1_confidence(logits, suppress_token=suppress_token)
    visible = visible_logits(logits, suppress_token)
    noise = exponential_noise(seed, visible.shape[:-1], visible.shape[-1])
    perturbed = visible / temperature - noise.log()
    broken = visible.isnan().any(dim=-1) | (visible == torch.inf).any(dim=-1)
    token = torch.where(broken, visible.argmax(dim=-1), perturbed.argmax(dim=-1))
    probability = softmax_of(visible, temperature)
    return token, probability.gather(-1, token.unsqueeze(-1)).squeeze(-1)


def sample_partial(
    logits_shard: Tensor,
    seed: Tensor,
    vocab_start: int,
    *,
    temperature: float = 1.0,
    suppress_token: int = -1,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    maximum, sum_exp, first = top1_partial(
        logits_shard, vocab_start, temperature=temperature, suppress_token=suppress_token
    )
    local = local_suppress_token(logits_shard, vocab_start, suppress_token)
    visible = visible_logits(logits_shard, local)
    noise = exponential_noise(seed, visible.shape[:-1], visible.shape[-1], vocab_start)
    perturbed = visible / temperature - noise.log()
    sampled = perturbed.argmax(dim=-1, keepdim=True)
    logit = visible.gather(-1, sampled).squeeze(-1)
    # NaN, +inf and all -inf: the shard's top-1, which is also what its score says
    defined = maximum.isfinite()
    token = torch.where(defined, sampled.squeeze(-1) + vocab_start, first)
    score = torch.where(defined, perturbed.gather(-1, sampled).squeeze(-1), maximum)
    weight = torch.exp((logit - maximum) / temperature)
    weight = torch.where(maximum == -torch.inf, 0.0, torch.where(defined, weight, torch.nan))
    return maximum, sum_exp, token, score, weight


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
