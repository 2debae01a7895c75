"""Noise for sampling: Philox4x32-10 words keyed by (seed, offset, row, id), Gumbel noise of them.

A number depends on its key alone, not on programs or backends. Key: the two halves of the 64-bit
seed; counter: (place >> 2, row, the two halves of the 64-bit offset); word place & 3 of the four.
The place of an id is the id, that of draw tile t is 2^31 + t.
"""

import triton
import triton.language as tl


@triton.jit
def row_key(seed, row, SEED_PER_ROW: tl.constexpr):
    """(seed, offset, row in the counter). The row is 0 where each row has a seed of its own."""
    if SEED_PER_ROW:
        return tl.load(seed + row * 2), tl.load(seed + row * 2 + 1), row * 0
    return tl.load(seed), tl.load(seed + 1), row


@triton.jit
def philox_words(seed, row, offset, group):
    """uint32 words of ids 4 group + (0, 1, 2, 3)."""
    zero = group * 0
    return tl.philox(
        seed, group, zero + row.to(tl.int32), zero + offset.to(tl.int32),
        zero + (offset >> 32).to(tl.int32),
    )


@triton.jit
def gumbel_of_word(word):
    """-log(E) for E = -log1p(-v) ~ Exp(1), v in (0, 1) of the word."""
    v = tl.minimum((word.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.9999999403953552)
    # log1p(-v) = log(u) * -v / (u - 1) with u = 1 - v rounded: u's rounding error cancels, which
    # matters because the race is won by small v
    u = 1.0 - v
    one = u == 1.0
    exponential = tl.where(one, v, tl.log(u) * v / tl.where(one, 1.0, u - 1.0))
    return -tl.log(exponential)


DRAW_TILE = tl.constexpr(64)  # csrc/common/constants.h: ids that a draw takes together
TILE_GROUPS = tl.constexpr(1 << 29)  # tiles are counted from 2^31 on, four to a group


@triton.jit
def tile_noise(seed, row, offset, tile):
    """Gumbel noise of draw tiles of the whole vocabulary, in the shape of ``tile``."""
    word0, word1, word2, word3 = philox_words(seed, row, offset, tile // 4 + TILE_GROUPS)
    place = tile % 4
    low = tl.where(place == 0, word0, word1)
    high = tl.where(place == 2, word2, word3)
    return gumbel_of_word(tl.where(place < 2, low, high))


@triton.jit
def id_noise(seed, row, offset, tile):
    """Gumbel noise of a draw tile's ids: [64] for a scalar tile, [M, 64] for tiles [M, 1]."""
    lanes = tl.arange(0, DRAW_TILE // 4)
    if len(tile.shape) == 0:
        group = tile * (DRAW_TILE // 4) + lanes
    else:
        group = tile * (DRAW_TILE // 4) + lanes[None, :]
    word0, word1, word2, word3 = philox_words(seed, row, offset, group)
    word = tl.interleave(tl.interleave(word0, word2), tl.interleave(word1, word3))
    return gumbel_of_word(word)
