"""Noise for sampling: Philox4x32-10 words keyed by (seed, offset, row, id), Gumbel noise of them.

A number depends on its key alone, not on tiles, programs or backends. Key: the two halves of the
64-bit seed; counter: (id >> 2, row, the two halves of the 64-bit offset); word id & 3 of the four.
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


@triton.jit
def gumbel_noise(
    seed, row, offset, tile, TILE: tl.constexpr, first_group=0, SHIFT: tl.constexpr = 0
):
    """Noise of the ids of one vocabulary tile, [TILE]; the row begins at 4 first_group + SHIFT."""
    group = first_group + tile * (TILE // 4) + tl.arange(0, TILE // 4)
    word0, word1, word2, word3 = philox_words(seed, row, offset, group)
    if SHIFT != 0:  # four adjacent ids then need the words of two counters
        next0, next1, next2, _ = philox_words(seed, row, offset, group + 1)
        if SHIFT == 1:
            word0, word1, word2, word3 = word1, word2, word3, next0
        elif SHIFT == 2:
            word0, word1, word2, word3 = word2, word3, next0, next1
        else:
            word0, word1, word2, word3 = word3, next0, next1, next2
    word = tl.interleave(tl.interleave(word0, word2), tl.interleave(word1, word3))
    return gumbel_of_word(word)
