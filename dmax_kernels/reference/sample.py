"""Sampling by the Gumbel-max rule, with noise from a counter-based generator (Philox4x32-10)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dmax_kernels.ops.sample import Sample
from dmax_kernels.reference.top1 import (
    local_suppress_token,
    shard_masses,
    softmax_of,
    top1_partial,
    visible_logits,
    winning_token,
)
from dmax_kernels.vocabulary import visible_tokens

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


TILE = 64
TILE_COUNTERS = 1 << 31  # where the counters of the tiles begin; below are those of the ids


def exponential_noise(seed: Tensor, shape: torch.Size, count: int, first: int = 0) -> Tensor:
    """Exp(1) noise [..., count] of the counters from ``first`` on, those of ids or of tiles: the
    same (seed, offset, row, counter) gives the same number everywhere.
    """
    num_rows = shape.numel()
    if seed.dim() == 1:  # one (seed, offset) for all: the row is part of the counter
        pairs = seed.expand(num_rows, 2)
        row = torch.arange(num_rows, device=seed.device)
    else:  # one per row: a draw does not depend on the row's place in the batch
        pairs = seed.reshape(num_rows, 2)
        row = torch.zeros(num_rows, dtype=torch.int64, device=seed.device)
    seed_r, offset_r = pairs[:, 0:1], pairs[:, 1:2]
    # Four of them share one call of the generator
    groups = range(first // 4, (first + count + 3) // 4)
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
    word = word.narrow(1, first % 4, count)
    # Small v carries the race's winner, and keeps its full precision near 0
    v = ((word.float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)
    return -torch.log1p(-v).reshape(*shape, count)


def draw(
    visible: Tensor, seed: Tensor, temperature: float | Tensor, first_id: int = 0
) -> tuple[Tensor, Tensor]:
    """(place of the sampled token, score of its tile) of logits whose ids begin at first_id, a
    multiple of 64: first a tile of 64 ids by its mass, then an id of the tile. -inf has no mass.
    """
    *shape, vocab = visible.shape
    scaled = torch.nn.functional.pad(visible / temperature, (0, -vocab % TILE), value=-torch.inf)
    tiles = scaled.unflatten(-1, (-1, TILE))
    noise = exponential_noise(
        seed, torch.Size(shape), tiles.shape[-2], TILE_COUNTERS + first_id // TILE
    )
    score, tile = (tiles.logsumexp(dim=-1) - noise.log()).max(dim=-1)
    noise = exponential_noise(seed, torch.Size(shape), scaled.shape[-1], first_id)
    perturbed = (scaled - noise.log()).unflatten(-1, (-1, TILE))
    of_tile = perturbed.gather(-2, tile[..., None, None].expand(*shape, 1, TILE)).squeeze(-2)
    return tile * TILE + of_tile.argmax(dim=-1), score


def kept_tokens(
    visible: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor
) -> Tensor:
    """Which tokens the filters keep, bool [..., V], with options [..., 1]: in each case the first
    ones in descending order of the logits, equal ones by ascending id.
    """
    order = torch.sort(visible, dim=-1, descending=True, stable=True)
    rank = torch.arange(visible.shape[-1], device=visible.device).expand_as(order.indices)
    kept = (rank < top_k) | (top_k == 0)
    depth = (order.values - order.values[..., :1]) / temperature
    mass = torch.where(kept, depth.double().exp(), 0.0)
    before = mass.cumsum(dim=-1) - mass
    kept &= (before < top_p * mass.sum(dim=-1, keepdim=True)) | (top_p == 1)
    kept &= (depth >= min_p.log()) | (min_p == 0)
    return torch.zeros_like(kept).scatter(-1, order.indices, kept)


def sample_tokens(
    logits: Tensor,
    seed: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    suppress_token: int = -1,
    suppress_tokens: Sequence[int] = (),
    allowed: Tensor | None = None,
    vocab_limit: int | None = None,
) -> Sample:
    vocab, suppress_token, allowed = visible_tokens(
        "sample_tokens", logits.shape[-1], logits.device, suppress_token, suppress_tokens, allowed,
        vocab_limit,
    )  # fmt: skip
    visible = visible_logits(logits[..., :vocab], suppress_token, allowed)

    def column(option: float | Tensor) -> Tensor:
        rows = torch.as_tensor(option, dtype=torch.float32, device=logits.device)
        return rows.expand(visible.shape[:-1]).unsqueeze(-1)

    t, k, p, m = map(column, (temperature, top_k, top_p, min_p))
    greedy = t == 0
    t = torch.where(greedy, 1.0, t)
    kept = visible.masked_fill(~kept_tokens(visible, t, k, p, m), -torch.inf)
    largest = visible.amax(dim=-1, keepdim=True)
    # NaN before +inf before all; nothing but -inf: id 0
    token = torch.where(
        greedy | ~largest.isfinite(),
        visible.argmax(dim=-1, keepdim=True),
        draw(kept, seed, t)[0].unsqueeze(-1),
    )
    top1_probability = softmax_of(visible.double(), t).amax(dim=-1, keepdim=True)
    probability = softmax_of(kept.double(), t).gather(-1, token)
    probability = torch.where(greedy, top1_probability, probability)
    relative = torch.exp((visible.gather(-1, token) - largest) / t).minimum(top1_probability)
    floats = (probability, top1_probability, relative)
    floats = (torch.where(largest.isfinite(), each, torch.nan).squeeze(-1) for each in floats)
    return Sample(token.squeeze(-1), *(each.float() for each in floats))


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
    place, score = draw(visible, seed, temperature, vocab_start)
    logit = visible.gather(-1, place.unsqueeze(-1)).squeeze(-1)
    # NaN, +inf and all -inf: the shard's top-1, which is also what its score says
    defined = maximum.isfinite()
    token = torch.where(defined, place + vocab_start, first)
    score = torch.where(defined, score, maximum)
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
