"""Statistics and the k most likely tokens over a sharded vocabulary: a part of
test_distributed.py.
"""

import float64
import pytest
import torch
import torch.distributed as dist
from cases import stacked_rows
from distributed_logprobs import random_masks
from ranks import Ranks, assert_same
from tolerances import ENTROPY_RTOL, assert_close, assert_statistics

import dmax_kernels
from dmax_kernels import distributed
from dmax_kernels.distributed import collectives

# 4,099: several tiles of the CPU kernels. 7: shards that hold fewer tokens than k
CASES = ((4099, torch.bfloat16), (1003, torch.float32), (7, torch.float16))


def options_of(ranks: Ranks, rows, vocab):
    return (
        {},
        {"temperature": 0.3, "suppress_token": 3},
        {"temperature": 3.0, "suppress_token": 4, "suppress_tokens": (0, vocab - 1)},
        *random_masks(ranks, rows, vocab),
    )


def assert_equal_on_all_ranks(ranks: Ranks, results) -> None:
    """Bit for bit, NaN too."""
    for mine in results:
        every = torch.empty(ranks.num_ranks * mine.numel(), dtype=torch.int32)
        bits = mine.contiguous().view(-1)
        bits = bits.view(torch.int32) if mine.dtype == torch.float32 else bits.int()
        collectives._all_gather(every, bits)
        assert torch.equal(every.view(ranks.num_ranks, -1), bits.expand(ranks.num_ranks, -1))


def float64_statistics(logits, temperature=1.0, suppress_token=-1):
    if isinstance(temperature, torch.Tensor):
        temperature = temperature.double().unsqueeze(-1)
    return float64.row_statistics(logits, temperature, suppress_token)


def check_row_statistics(ranks: Ranks) -> None:
    """Every edge case of rows, in every layout, and a row for each way to be sure."""
    for vocab, dtype in CASES:
        _, edges = stacked_rows(vocab, dtype)
        sure = torch.rand(8, vocab, generator=ranks.generator)
        sure[:, vocab // 2] = 1 + torch.tensor([1.0, 8.0, 15.0, 25.0, 29.5, 30.5, 35.0, 39.0])
        sure[4:, -1] = sure[4:, vocab // 2] - torch.tensor([0.0, 1.0, 10.0, 20.0])
        x = torch.cat([edges, sure.to(dtype), 3 * ranks.randn(6, vocab, dtype=dtype)])
        per_row = 0.1 + 2 * torch.rand(len(x), generator=ranks.generator)
        for options in (
            *options_of(ranks, len(x), vocab),
            {"temperature": per_row, "suppress_token": 5},
            {"temperature": per_row[:1]},
        ):
            expected = dmax_kernels.row_statistics(x, **options)
            exact = None
            if options.keys() <= {"suppress_token", "temperature"}:
                exact = float64_statistics(x, **options)
            for sizes, vocab_size in ranks.layouts(vocab):
                actual = distributed.row_statistics(
                    ranks.cut(x, sizes, 1), shard_sizes=sizes, vocab_size=vocab_size, **options
                )
                assert isinstance(actual, dmax_kernels.RowStatistics)
                assert_statistics(actual, expected, slack=2)
                if exact is not None:
                    assert_statistics(actual, exact)
                tied = expected.runner_up == expected.confidence
                assert torch.equal(actual.runner_up[tied], actual.confidence[tied])
                # A sure row keeps its digits, where its entropy is far below the absolute bound
                digits = (expected.entropy > 1e-8) & (expected.entropy < 1)
                assert_close(actual.entropy[digits], expected.entropy[digits], 2 * ENTROPY_RTOL)
        assert_equal_on_all_ranks(ranks, actual)
    check_temperature_per_row(ranks)


def check_temperature_per_row(ranks: Ranks) -> None:
    """A row has the bits that its temperature as a number gives it; the least and the largest."""
    x = 3 * ranks.randn(4, 8 * ranks.num_ranks)
    x[2, 1:] = x[2, 0]
    mine = ranks.cut(x, [8] * ranks.num_ranks, 1)
    temperatures = torch.tensor([0.7, 1e-30, 1e-30, 1e30])
    together = distributed.row_statistics(mine, temperature=temperatures)
    for row, number in enumerate(temperatures.tolist()):
        alone = distributed.row_statistics(mine[row], temperature=number)
        assert all(torch.equal(a[row], b) for a, b in zip(together, alone, strict=True))
    with pytest.raises(RuntimeError, match="^row_statistics: temperature must .* got 0 in row 1"):
        distributed.row_statistics(mine, temperature=torch.tensor([1.0, 0.0, 1.0, 1.0]))


def check_topk_confidence(ranks: Ranks) -> None:
    for vocab, dtype in CASES:
        _, edges = stacked_rows(vocab, dtype)
        x = torch.cat([edges, 3 * ranks.randn(6, vocab, dtype=dtype)])
        for options in options_of(ranks, len(x), vocab):
            for k in {1, 3, min(8, vocab)}:
                expected = dmax_kernels.topk_confidence(x, k, **options)
                for sizes, vocab_size in ranks.layouts(vocab):
                    actual = distributed.topk_confidence(
                        ranks.cut(x, sizes, 1), k, shard_sizes=sizes, vocab_size=vocab_size,
                        **options,
                    )  # fmt: skip
                    assert_same(actual, expected)
        assert_equal_on_all_ranks(ranks, actual)


def both(ranks: Ranks, whole, sizes, vocab, **options):
    """(op, the sharded results, those of the unsharded op)."""
    layout = {"shard_sizes": sizes, "vocab_size": vocab}
    mine = ranks.cut(whole, sizes, -1)
    for name, arguments in (("row_statistics", ()), ("topk_confidence", (5,))):
        yield (
            name,
            getattr(distributed, name)(mine, *arguments, **layout, **options),
            getattr(dmax_kernels, name)(whole, *arguments, **options),
        )


def check_statistics_shapes(ranks: Ranks) -> None:
    """No rows, one row, several dimensions; ties between shards; and what is refused."""
    vocab = 50
    logits = ranks.randn(2, 3, vocab)
    sizes = [vocab // ranks.num_ranks + 1] * ranks.num_ranks
    mask = torch.full((2, 3, 2), 0x0F0F0F0F, dtype=torch.int32)
    for whole, allowed in (
        (logits, mask),
        (logits, mask[0, :1]),
        (logits[0, 0], mask[0, 0]),
        (logits[0, 0], None),
        (logits[:0], mask[:0]),
        (logits[:, :0], None),
    ):
        for name, actual, expected in both(ranks, whole, sizes, vocab, allowed=allowed):
            assert [each.shape for each in actual] == [each.shape for each in expected]
            assert [each.dtype for each in actual] == [each.dtype for each in expected]
            if name == "row_statistics":
                assert_statistics(actual, expected, slack=2)
            else:
                assert_same(actual, expected)
    # Unequal logits that are equal once divided by 3, on the first shard and on the last
    low, high = 1.5 + 2**-23, 1.5 + 2**-22
    ties = torch.zeros(2, vocab)
    ties[0, 3], ties[0, -1] = low, high
    for _, actual, _ in both(ranks, ties, sizes, vocab, temperature=3.0):
        token = actual[0].view(2, -1)[:, 0]
        assert token.tolist() == [vocab - 1, 0]
    mine = ranks.cut(logits, sizes, -1)
    layout = {"shard_sizes": sizes, "vocab_size": vocab}
    for name, arguments, options, error, message in (
        ("topk_confidence", (0,), {}, RuntimeError, r"k must be in 1\.\.8 .* got 0"),
        ("topk_confidence", (9,), {}, RuntimeError, r"k must be in 1\.\.8 .* got 9"),
        ("topk_confidence", (2,), {"temperature": 0.0}, RuntimeError, "temperature must be at"),
        ("topk_confidence", (2,), {"suppress_token": 50}, ValueError, "suppress_token must be"),
        ("row_statistics", (), {"temperature": 0.0}, RuntimeError, "temperature must be at least"),
        ("row_statistics", (), {"suppress_tokens": (50,)}, ValueError, "suppress_tokens must be"),
        ("row_statistics", (), {"allowed": mask[..., :1]}, ValueError, "allowed must be int32"),
        ("row_statistics", (), {"allowed": mask[0]}, RuntimeError, "allowed must have shape"),
        ("row_statistics", (), {"temperature": torch.ones(5)}, RuntimeError, "temperatures must"),
    ):
        with pytest.raises(error, match=f"^{name}: {message}"):
            getattr(distributed, name)(mine, *arguments, **options, **layout)
    with pytest.raises(RuntimeError, match=r"k must be in 1\.\.\d .* at most V\), got 8"):
        distributed.topk_confidence(torch.zeros(2, 2), 8)


def check_statistics_bytes(ranks: Ranks) -> None:
    """One all-gather of what the docstrings say, and no other collective."""
    sent = []
    all_gather, all_reduce = collectives._all_gather, dist.all_reduce

    def counted_gather(output, payload, **options):
        sent.append(payload.nbytes - 8)  # on the CPU: the header
        return all_gather(output, payload, **options)

    def no_reduce(*arguments, **options):
        raise AssertionError("an all-reduce")

    collectives._all_gather, dist.all_reduce = counted_gather, no_reduce
    try:
        mine = ranks.randn(5, 40)
        distributed.row_statistics(mine, temperature=torch.full((5,), 0.5), suppress_token=3)
        for k in (1, 8):
            distributed.topk_confidence(mine, k, suppress_tokens=(3, 4))
        assert sent == [5 * 24, 5 * (4 + 12), 5 * (4 + 12 * 8)]
    finally:
        collectives._all_gather, dist.all_reduce = all_gather, all_reduce
