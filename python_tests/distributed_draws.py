"""Draws over a sharded vocabulary and those of the unsharded op: a part of test_distributed.py."""

import pytest
import torch
import torch.distributed as dist
from cases import DTYPES
from ranks import SEED, Ranks, assert_same

import dmax_kernels
from dmax_kernels import distributed
from dmax_kernels.distributed import collectives


def check_draws(ranks: Ranks) -> None:
    """Shards of whole tiles, and others; filters, masks, and options per row, one at a time."""
    vocab, rows = 1000, 30
    logits = 3 * ranks.randn(rows, vocab)
    logits[3] = -torch.inf
    logits[4, 700] = torch.nan
    mask = torch.randint(-(2**31), 2**31, (rows, 32), generator=ranks.generator).int()
    mask[5] = 0
    per_row = torch.rand(rows, generator=ranks.generator)
    even = -(-vocab // (64 * ranks.num_ranks)) * 64
    for sizes in (
        [even] * ranks.num_ranks,
        [100, *[900 // (ranks.num_ranks - 1)] * (ranks.num_ranks - 1)],
    ):
        mine = ranks.cut(logits, sizes, 1)
        layout = {"shard_sizes": sizes, "vocab_size": vocab}
        for options in (
            {},
            {"allowed": mask},
            {"allowed": mask[:1], "suppress_tokens": (5, 999), "temperature": 0.7},
            {"allowed": mask, "temperature": 0},
            {"top_k": 7},
            {"top_p": per_row, "suppress_token": 9, "min_p": 0.01, "allowed": mask},
            {"temperature": per_row.round(decimals=1)},
            {
                "temperature": per_row.round(decimals=1),
                "top_k": (9 * per_row).round(),
                "top_p": 0.9,
            },
            {"top_k": 300, "top_p": 0.6, "min_p": 1e-3, "temperature": 2.0},
            {"top_k": 10**12, "min_p": 1.0},
        ):
            assert_same(
                distributed.sample_tokens(mine, SEED, **layout, **options),
                dmax_kernels.sample_tokens(logits, SEED, **options),
            )


def check_filters(ranks: Ranks) -> None:
    """Cuts among thousands of equal values on all shards, and how much is sent to find them."""
    vocab, rows = 64 * 40 * ranks.num_ranks, 6
    sent = []
    all_reduce, all_gather = dist.all_reduce, collectives._all_gather

    def counted_reduce(tensor, **options):
        sent.append(tensor.nbytes)
        return all_reduce(tensor, **options)

    def counted_gather(output, payload, **options):
        sent.append(payload.nbytes)
        return all_gather(output, payload, **options)

    dist.all_reduce, collectives._all_gather = counted_reduce, counted_gather
    try:
        for dtype in DTYPES:
            logits = 3 * ranks.randn(rows, vocab)
            logits[1] = 0.0
            logits[2] = logits[2].round() * -0.0 + (logits[2] > 4)
            logits[3] = logits[3].round()
            logits[4, ::3] = -torch.inf
            logits = logits.to(dtype)
            mine = ranks.cut(logits, [vocab // ranks.num_ranks] * ranks.num_ranks, 1)
            for options in (
                {"top_k": 3000},
                {"top_k": vocab - 5, "temperature": 0.5},
                {"top_p": 0.4},
                {"top_p": torch.tensor([1.0, 0.3, 0.9, 0.5, 1e-9, 0.99])},
                {"top_k": torch.tensor([1, 2600, 0, 700, 5000, vocab]), "top_p": 0.7, "min_p": 0.3},
            ):
                sent.clear()
                for seed in (SEED, SEED + 1, SEED + 2):
                    assert_same(
                        distributed.sample_tokens(mine, seed, **options),
                        dmax_kernels.sample_tokens(logits, seed, **options),
                    )
                assert sum(sent) < 3 * rows * 8 * 256 * (9 if dtype == torch.float32 else 5)
    finally:
        dist.all_reduce, collectives._all_gather = all_reduce, all_gather
    for options, message in (
        ({"top_p": torch.full((rows,), 1.5)}, "top_p must be above 0 and at most 1"),
        ({"top_k": -1}, "top_k must be 0"),
        ({"allowed": torch.ones(3).int(), "top_k": 2}, "allowed must have shape"),
    ):
        with pytest.raises(RuntimeError, match=f"^sample_tokens: {message}"):
            distributed.sample_tokens(mine, SEED, **options)
