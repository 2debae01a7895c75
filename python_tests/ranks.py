"""What the ranks of the distributed tests share: a generator, ways to cut a vocabulary, a check."""

import itertools
import random

import torch
from tolerances import CONFIDENCE_RTOL, assert_close

SEED = torch.tensor([1234567890123456789, 42])


def assert_same(actual, expected, rtol=2 * CONFIDENCE_RTOL):
    """Ids must be equal, probabilities equal to rounding (float32 flushes tiny ones)."""
    assert torch.equal(actual[0], expected[0]), (actual[0] - expected[0]).nonzero()
    for each, wanted in zip(actual[1:], expected[1:], strict=True):
        assert_close(each, wanted, rtol, atol=1e-37)


class Ranks:
    """This process's rank, and one random generator that all ranks share."""

    def __init__(self, rank: int, num_ranks: int):
        self.rank, self.num_ranks = rank, num_ranks
        self.random = random.Random(num_ranks)
        self.generator = torch.Generator().manual_seed(num_ranks)

    def layouts(self, vocab: int):
        """(shard_sizes, vocab_size) over `vocab` ids: even, at random places, with an empty shard,
        and padded so that the last rank holds nothing but padding.
        """
        even = -(-vocab // self.num_ranks)
        yield [even] * self.num_ranks, vocab
        cuts = sorted(self.random.randrange(1, vocab) for _ in range(self.num_ranks - 1))
        edges = [0, *cuts, vocab]
        uneven = [b - a for a, b in itertools.pairwise(edges)]
        yield uneven, None
        yield [0, *uneven[1:-1], uneven[0] + uneven[-1]], None
        yield [vocab, *[7] * (self.num_ranks - 1)], vocab

    def cut(self, whole: torch.Tensor, sizes: list[int], dim: int) -> torch.Tensor:
        """This rank's part; padding is NaN, so that a read of it shows."""
        start = sum(sizes[: self.rank])
        missing = sum(sizes) - whole.shape[dim]
        if missing:
            shape = list(whole.shape)
            shape[dim] = missing
            whole = torch.cat([whole, torch.full(shape, torch.nan, dtype=whole.dtype)], dim)
        return whole.narrow(dim, start, sizes[self.rank]).clone()

    def randn(self, *shape, dtype=torch.float32):
        return torch.randn(*shape, generator=self.generator).to(dtype)
