"""What a filter searches a row for: its cut, ties by id, tokens to report.

Everything here reads only the draw tiles (64 ids) whose maximum says that they matter.
"""

import triton
import triton.language as tl

from dmax_kernels.triton.philox import DRAW_TILE
from dmax_kernels.triton.stats import NO_ID
from dmax_kernels.triton.topk import order_key, value_of_key

LOWEST_KEY = tl.constexpr(-0x7F800001)  # of -inf


@triton.jit
def load_visible(row, tile, active, vocab, suppress_token, allowed, HAS_ALLOWED: tl.constexpr):
    """Ids and float32 logits [N, 64] of draw tiles [N], -inf where not active or not visible."""
    ids = tile[:, None] * DRAW_TILE + tl.arange(0, DRAW_TILE)[None, :]
    if HAS_ALLOWED:
        inside = active[:, None] & (ids < vocab)
        words = tl.load(allowed + ids // 32, mask=inside, other=0)
        visible = (words >> (ids % 32)) & 1
        active &= tl.max(visible, axis=1) > 0
    # One mask per tile leaves the loads 16 bytes wide; one per id does not
    if tl.max(tile, axis=0) < vocab // DRAW_TILE:
        x = tl.load(row + ids, mask=active[:, None], other=float("-inf")).to(tl.float32)
    else:
        inside = active[:, None] & (ids < vocab)
        x = tl.load(row + ids, mask=inside, other=float("-inf")).to(tl.float32)
    if HAS_ALLOWED:
        x = tl.where(visible != 0, x, float("-inf"))
    return ids, tl.where(ids == suppress_token, float("-inf"), x)


@triton.jit
def load_stats(tile_max, tile_sum, start, num_tiles, N: tl.constexpr):
    """(draw tiles, their maxima, their sums, which are broken) [N]; a broken maximum is -inf."""
    tile = start + tl.arange(0, N)
    inside = tile < num_tiles
    maxima = tl.load(tile_max + tile, mask=inside, other=float("-inf"))
    sums = tl.load(tile_sum + tile, mask=inside, other=0.0)
    broken = sums != sums
    return tile, tl.where(broken, float("-inf"), maxima), sums, broken


@triton.jit
def weights(x, maximum, scale):
    return tl.exp2((x - maximum) * scale)


@triton.jit
def measure_of(x, keys, least, maximum, scale, by_mass):
    """The number or the mass of x whose key is at least that, as float64."""
    part = tl.where(by_mass, weights(x, maximum, scale), 1.0)
    return tl.sum(tl.where(keys >= least, part, 0.0)).to(tl.float64)


@triton.jit
def middle(low, high):
    """Rounded up, so that low < middle <= high."""
    return (low & high) + ((low ^ high) >> 1) + ((low ^ high) & 1)


@triton.jit
def maxima_bound(
    tile_max, tile_sum, num_tiles, maximum, scale, target, by_mass, STATS: tl.constexpr
):
    """A key that the cut cannot be below: the tiles' maxima down to it reach the target alone."""
    low = tl.zeros([], tl.int32) + LOWEST_KEY
    high = order_key(maximum)
    while low < high:
        key = middle(low, high)
        found = tl.zeros([], tl.float64)
        for start in range(0, num_tiles, STATS):
            _, maxima, _, _ = load_stats(tile_max, tile_sum, start, num_tiles, STATS)
            keys = tl.where(maxima == float("-inf"), LOWEST_KEY - 1, order_key(maxima))
            found += measure_of(maxima, keys, key, maximum, scale, by_mass)
        if found >= target:
            low = key
        else:
            high = key - 1
    return low


@triton.jit
def measure_row(
    row, vocab, suppress_token, allowed, tile_max, tile_sum, num_tiles, maximum, scale, low, key,
    by_mass, HAS_ALLOWED: tl.constexpr, N: tl.constexpr,
):
    """(measure of the tokens down to key, the lowest key of those, the highest key below), from
    the tiles whose maximum is at least low.
    """
    found = tl.zeros([], tl.float64)
    above = tl.zeros([], tl.int32) + 0x7FFFFFFF
    below = tl.zeros([], tl.int32) + LOWEST_KEY
    for start in range(0, num_tiles, N):
        tile, maxima, _, _ = load_stats(tile_max, tile_sum, start, num_tiles, N)
        active = (order_key(maxima) >= low) & (maxima > float("-inf"))
        if tl.max(active.to(tl.int32), axis=0) > 0:
            _ids, x = load_visible(row, tile, active, vocab, suppress_token, allowed, HAS_ALLOWED)
            keys = tl.where(x == float("-inf"), LOWEST_KEY - 1, order_key(x))
            found += measure_of(x, keys, key, maximum, scale, by_mass)
            above = tl.minimum(above, tl.min(tl.where(keys >= key, keys, 0x7FFFFFFF)))
            below = tl.maximum(below, tl.max(tl.where(keys < key, keys, LOWEST_KEY)))
    return found, above, below


@triton.jit
def cut_of(
    row, vocab, suppress_token, allowed, tile_max, tile_sum, num_tiles, maximum, scale, target,
    by_mass, HAS_ALLOWED: tl.constexpr, N: tl.constexpr, STATS: tl.constexpr,
):
    """The key of the token with which the count, or the mass relative to the maximum's, reaches
    the target; the measure above that key, and down to it. LOWEST_KEY if no token does.
    """
    # The cut is never below low and never above high
    low = maxima_bound(tile_max, tile_sum, num_tiles, maximum, scale, target, by_mass, STATS)
    high = order_key(maximum)
    above = tl.zeros([], tl.float64)
    down_to = tl.zeros([], tl.float64)
    while (low < high) | ((low > LOWEST_KEY) & (down_to == 0)):
        key = tl.where(low < high, middle(low, high), low)
        found, nearest, below = measure_row(
            row, vocab, suppress_token, allowed, tile_max, tile_sum, num_tiles, maximum, scale,
            low, key, by_mass, HAS_ALLOWED, N,
        )
        if found >= target:
            low = nearest
            down_to = found
        else:
            # At low itself the measure falls short only by the rounding of its sum
            down_to = tl.where(low == high, found, down_to)
            above = tl.where(low == high, above, found)
            high = tl.maximum(low, below)
    return low, above, down_to


@triton.jit
def id_of_tie(
    row, vocab, suppress_token, allowed, tile_max, tile_sum, num_tiles, key, number,
    HAS_ALLOWED: tl.constexpr, N: tl.constexpr,
):
    """The id of the number-th of the tokens with that key, by ascending id; NO_ID beyond them."""
    before = tl.zeros([], tl.int32)
    token = tl.zeros([], tl.int32) + NO_ID
    for start in range(0, num_tiles, N):
        tile, maxima, _, _ = load_stats(tile_max, tile_sum, start, num_tiles, N)
        active = order_key(maxima) >= key
        if (tl.max(active.to(tl.int32), axis=0) > 0) & (token == NO_ID):
            ids, x = load_visible(row, tile, active, vocab, suppress_token, allowed, HAS_ALLOWED)
            ties = (order_key(x) == key).to(tl.int32)
            of_tile = tl.sum(ties, axis=1)
            rank = before + (tl.cumsum(of_tile, axis=0) - of_tile)[:, None]
            rank += tl.cumsum(ties, axis=1)
            token = tl.min(tl.where((ties > 0) & (rank == number), ids, NO_ID))
            before += tl.sum(of_tile, axis=0)
    return token


@triton.jit
def row_mass(tile_max, tile_sum, num_tiles, scale, STATS: tl.constexpr):
    """(maximum, sum of exponentials, whether any logit is NaN or +inf) of a row's draw tiles."""
    maximum = tl.zeros([], tl.float32) + float("-inf")
    any_broken = tl.zeros([], tl.int32)
    for start in range(0, num_tiles, STATS):
        _, maxima, _, broken = load_stats(tile_max, tile_sum, start, num_tiles, STATS)
        maximum = tl.maximum(maximum, tl.max(maxima, axis=0))
        any_broken = tl.maximum(any_broken, tl.max(broken.to(tl.int32), axis=0))
    total = tl.zeros([], tl.float32)
    reference = tl.where(maximum == float("-inf"), 0.0, maximum)
    for start in range(0, num_tiles, STATS):
        _, maxima, sums, _ = load_stats(tile_max, tile_sum, start, num_tiles, STATS)
        total += tl.sum(sums * weights(maxima, reference, scale), axis=0)
    return maximum, total, any_broken


@triton.jit
def kept_mass(
    row, vocab, suppress_token, allowed, tile_max, tile_sum, num_tiles, maximum, scale, key,
    last_id, HAS_ALLOWED: tl.constexpr, N: tl.constexpr,
):
    """The mass of the tokens down to (key, last_id), added up as the search adds it up."""
    whole = tl.zeros([], tl.float64)
    for start in range(0, num_tiles, N):
        tile, maxima, _, _ = load_stats(tile_max, tile_sum, start, num_tiles, N)
        active = order_key(maxima) >= key
        if tl.max(active.to(tl.int32), axis=0) > 0:
            ids, x = load_visible(row, tile, active, vocab, suppress_token, allowed, HAS_ALLOWED)
            kept = kept_of(x, ids, key, last_id, maximum, 1.0, float("-inf"))
            whole += tl.sum(tl.where(kept, weights(x, maximum, scale), 0.0)).to(tl.float64)
    return whole


@triton.jit
def ties_at(key, above, down_to, target, maximum, scale, by_mass):
    """(how many of the equal tokens at a cut the target takes, how many there are)."""
    each = tl.where(by_mass, weights(value_of_key(key), maximum, scale), 1.0)
    number = tl.ceil((target - above) / each)
    return number, tl.floor((down_to - above) / each + 0.5)


@triton.jit
def broken_token(
    row, vocab, suppress_token, allowed, tile_max, tile_sum, num_tiles, HAS_ALLOWED: tl.constexpr,
    N: tl.constexpr,
):
    """The id of the row's first NaN, or else of its first +inf."""
    nan_token = tl.zeros([], tl.int32) + NO_ID
    inf_token = tl.zeros([], tl.int32) + NO_ID
    for start in range(0, num_tiles, N):
        tile, _, _, broken = load_stats(tile_max, tile_sum, start, num_tiles, N)
        if tl.max(broken.to(tl.int32), axis=0) > 0:
            ids, x = load_visible(row, tile, broken, vocab, suppress_token, allowed, HAS_ALLOWED)
            nan_token = tl.minimum(nan_token, tl.min(tl.where(x != x, ids, NO_ID)))
            inf_token = tl.minimum(inf_token, tl.min(tl.where(x == float("inf"), ids, NO_ID)))
    return tl.where(nan_token != NO_ID, nan_token, inf_token)


@triton.jit
def kept_of(x, ids, key, last_id, maximum, inverse_temperature, least_depth):
    keys = order_key(x)
    kept = (keys > key) | ((keys == key) & (ids <= last_id))
    return kept & ((x - maximum) * inverse_temperature >= least_depth)
