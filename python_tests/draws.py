"""Whether tokens are those that the rule of sample_tokens draws."""

import torch
from torch import Tensor

from dmax_kernels.reference.sample import TILE, TILE_COUNTERS, exponential_noise


def assert_drawn(token: Tensor, x: Tensor, seed: Tensor, slack: float | Tensor) -> None:
    """``token`` [...] wins both races of the draw from x = logits / temperature [..., V], which is
    -inf at tokens that are not kept: that of the tiles of 64 ids, and that within the tile.

    Backends round the scores differently: a score may lie ``slack`` below the largest one. Rows
    with a NaN or +inf, and rows without mass, have no draw and are left out.
    """
    *shape, vocab = x.shape
    drawn = x.amax(dim=-1).isfinite()
    x = torch.nn.functional.pad(x.double(), (0, -vocab % TILE), value=-torch.inf)
    x = x.unflatten(-1, (-1, TILE))
    noise = exponential_noise(seed, torch.Size(shape), x.shape[-2], TILE_COUNTERS)
    missed = shortfall(x.logsumexp(dim=-1) - noise.double().log(), token // TILE)
    noise = exponential_noise(seed, torch.Size(shape), x.shape[-2] * TILE)
    tile = (token // TILE)[..., None, None].expand(*shape, 1, TILE)
    within = (x - noise.double().log().view_as(x)).gather(-2, tile).squeeze(-2)
    missed = torch.maximum(missed, shortfall(within, token % TILE))
    assert (missed <= slack)[drawn].all(), missed[drawn]


def shortfall(scores: Tensor, place: Tensor) -> Tensor:
    """How far the score at ``place`` lies below the largest of its row."""
    return scores.amax(dim=-1) - scores.gather(-1, place.unsqueeze(-1)).squeeze(-1)
