"""The draw: a tile of 64 ids by its mass, then an id in it, both by the Gumbel-max rule.

The noise is keyed by (seed, offset, row, place), so that a sample is the same however it is
computed.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dmax_kernels.triton.philox import DRAW_TILE, id_noise, tile_noise
from dmax_kernels.triton.stats import NO_ID, first_where, merge_sums


@triton.jit
def draw_tiles(x, scale, inverse_temperature):
    """(maximum, sum of exponentials, log of the mass) [N] of draw tiles, whose logits are [N, 64].

    Each sum is relative to its own tile's maximum. It is NaN with a NaN or +inf in the tile.
    """
    maximum = tl.max(x, axis=1)
    reference = tl.where(maximum == float("-inf"), 0.0, maximum)
    sum_exp = tl.sum(tl.exp2((x - reference[:, None]) * scale), axis=1)
    return maximum, sum_exp, maximum * inverse_temperature + tl.log(sum_exp)


@triton.jit
def best_of(score, places):
    """(largest score, its lowest place)."""
    best = tl.max(score, axis=0)
    return best, first_where(score == best, places)


@triton.jit
def draw_in_tile(x, tile, first_tile, inverse_temperature, seed, row, offset):
    """The id drawn in a tile of the row, whose logits x are [64]; first_tile is the row's first."""
    ids = tile * DRAW_TILE + tl.arange(0, DRAW_TILE)
    noise = id_noise(seed, row, offset, first_tile + tile)
    _, token = best_of(x * inverse_temperature + noise, ids)
    return token


@triton.jit
def sample_of_tiles(
    x, ids, tile, first_tile, scale, inverse_temperature, seed, row, offset, N: tl.constexpr
):
    """(maximum, sum of exponentials, score, id drawn) of draw tiles tile .. tile + N.

    With a NaN or +inf the maximum is that, and the id is its first one's.
    """
    maxima, sums, log_mass = draw_tiles(x, scale, inverse_temperature)
    maximum = tl.max(maxima, axis=0)
    sum_exp = merge_sums(maxima, sums, maximum, scale)
    tiles = tile + tl.arange(0, N)
    score, winner = best_of(
        log_mass + tile_noise(seed, row, offset, first_tile + tiles), tiles
    )
    of_winner = tl.max(tl.where((tiles == winner)[:, None], x, float("-inf")), axis=0)
    token = draw_in_tile(of_winner, winner, first_tile, inverse_temperature, seed, row, offset)
    if sum_exp != sum_exp:
        nan_token = tl.min(tl.min(tl.where(x != x, ids, NO_ID), axis=1), axis=0)
        token = tl.min(tl.min(tl.where(x == float("inf"), ids, NO_ID), axis=1), axis=0)
        maximum = float("inf")
        if nan_token != NO_ID:
            token = nan_token
            maximum = float("nan")
    return maximum, sum_exp, score, token


@triton.jit
def store_sample(
    row, token, value, best, total, scale, out_token, out_probability, out_top1, out_relative
):
    """The four results of a row: its token with its logit, and the row's maximum and sum."""
    weight = tl.exp2((value - best) * scale)
    top1 = 1.0 / total
    tl.store(out_token + row, token.to(tl.int64))
    tl.store(out_probability + row, weight / total)
    tl.store(out_top1 + row, top1)
    tl.store(out_relative + row, tl.minimum(top1, weight, propagate_nan=tl.PropagateNan.ALL))


class Results(NamedTuple):
    """What sample_tokens and linear_sample_tokens give, [rows] each."""

    token: Tensor
    probability: Tensor
    top1_probability: Tensor
    relative_confidence: Tensor

    @classmethod
    def empty(cls, count: int, device: torch.device) -> "Results":
        floats = (torch.empty(count, dtype=torch.float32, device=device) for _ in range(3))
        return cls(torch.empty(count, dtype=torch.int64, device=device), *floats)

    def span(self, rows: slice) -> "Results":
        return Results(*(t[rows] for t in self))

    def in_shape(self, shape: torch.Size) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return tuple(t.view(shape) for t in self)


def greedy_results(token: Tensor, confidence: Tensor) -> Results:
    return Results(token, confidence, confidence.clone(), confidence.clone())
