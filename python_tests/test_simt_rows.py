"""The CUDA kernels over vocabulary rows, run on the CPU: top-1, top-k, partial, merge, sampling."""

import float64
import pytest
import simt_ops
import torch
from cases import DTYPES, SMALL_VOCABS, stacked_rows, strided_copies
from simt_build import load
from simt_ops import A100, CHOSEN, H200, H200_CLUSTERS, ONE_MULTIPROCESSOR
from tolerances import (
    CONFIDENCE_RTOL,
    ENTROPY_ATOL,
    ENTROPY_RTOL,
    assert_close,
)

from dmax_kernels import reference

# Nine tiles of bfloat16 and a tail: the smallest rows that choose_row_launch splits among blocks
SPLIT_VOCAB = 9 * 2048 + 3


def random_rows(num_rows, vocab_size, dtype=torch.float32, seed=0, scale=3.0):
    generator = torch.manual_seed(seed)
    return (scale * torch.randn(num_rows, vocab_size, generator=generator)).to(dtype)


def assert_top1(logits, token, confidence, **options):
    expected_token, expected_confidence = float64.top1_confidence(logits, **options)
    assert token.tolist() == expected_token.tolist()
    assert_close(confidence, expected_confidence, CONFIDENCE_RTOL)


# Every edge case in every dtype: tails, tile edges, ties at each level. Few rows per multiprocessor
# and many, since these small rows are never split
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", SMALL_VOCABS)
def test_top1_edge_cases(dtype, vocab_size):
    _, logits = stacked_rows(vocab_size, dtype)
    assert_top1(logits, *simt_ops.top1_confidence(logits))


# The same cases where a row's tiles lie in several blocks, so that ties and NaN meet in global
# memory; and where one block has them all
@pytest.mark.parametrize(("gpu", "splits"), [(H200, 2), (ONE_MULTIPROCESSOR, 1)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_top1_split_rows(gpu, splits, dtype):
    _, logits = stacked_rows(SPLIT_VOCAB, dtype)
    token, confidence = simt_ops.top1_confidence(logits, gpu=gpu)
    assert CHOSEN[-1].splits == (splits if dtype == torch.bfloat16 or splits == 1 else 3)
    assert_top1(logits, token, confidence)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [157183, 157184])
def test_top1_large_vocabulary(dtype, vocab_size):
    logits = random_rows(3, vocab_size, dtype)
    for gpu, splits in ((H200, 20 if dtype == torch.float32 else 10), (ONE_MULTIPROCESSOR, 1)):
        token, confidence = simt_ops.top1_confidence(logits, gpu=gpu)
        assert CHOSEN[-1].splits == splits
        assert torch.equal(token, logits.float().argmax(dim=-1))
        assert_close(confidence, float64.softmax_of(logits).amax(dim=-1), CONFIDENCE_RTOL)


# One block more than the GPU holds at once would run alone, after all the others
def test_split_rows_fit_the_gpu_at_once():
    multiprocessors, rows = 4, 5
    gpu = (multiprocessors, *H200[1:])
    logits = random_rows(rows, 25 * 2048, torch.bfloat16)
    seed = torch.tensor([1, 2])
    a100 = (multiprocessors, *A100[1:])
    # 25 tiles on eight warps: two blocks take them in two rounds, three would not take fewer
    ops = [
        (2, lambda: simt_ops.top1_confidence(logits, gpu=gpu)),
        (2, lambda: simt_ops.row_statistics(logits, gpu=gpu)),
        (2, lambda: simt_ops.sample_tokens(logits, seed, gpu=gpu)),
        (1, lambda: simt_ops.sample_tokens(logits, seed, top_k=5, gpu=a100)),
    ]
    for splits, run in ops:
        run()
        assert CHOSEN[-1].splits == splits


# (rows, blocks that run at once, blocks per row) at 77 tiles: what an H100's times ask for
@pytest.mark.parametrize(
    ("rows", "at_once", "splits"),
    [(1, 528, 10), (32, 528, 10), (64, 528, 5), (128, 528, 4), (256, 528, 2), (384, 528, 1),
     (768, 528, 5), (1024, 528, 5), (4096, 528, 1), (32, 396, 10), (128, 396, 3), (256, 396, 1),
     (512, 396, 5), (1024, 396, 5), (4096, 396, 1)],
)  # fmt: skip
def test_splits_of_rows(rows, at_once, splits):
    assert load().splits_of(rows, 77, at_once) == splits


# Beyond 3,008 tiles a block's shared memory cannot hold a row's partial results: split even at
# many rows per multiprocessor
def test_top1_vocabulary_beyond_shared_memory():
    logits = random_rows(5, 3009 * 1024, torch.float32)
    logits[:, 2_999_999] = 40.0
    token, _ = simt_ops.top1_confidence(logits, gpu=ONE_MULTIPROCESSOR)
    assert CHOSEN[-1].splits > 1
    assert token.tolist() == [2_999_999] * 5


# Where a cluster takes each row, the bits are those of the blocks that meet in global memory: all
# edge cases; clusters of two, four and eight blocks, and more tiles than eight blocks have warps
@pytest.mark.parametrize(
    ("dtype", "vocab_size", "cluster"),
    [
        (torch.bfloat16, SPLIT_VOCAB, 2),
        (torch.float32, SPLIT_VOCAB, 2),
        (torch.float16, 25 * 2048, 4),
        (torch.bfloat16, 41 * 2048 - 1, 8),
        (torch.float32, 85 * 1024 + 3, 8),
    ],
    ids=str,
)
def test_cluster_per_row(dtype, vocab_size, cluster):
    _, logits = stacked_rows(vocab_size, dtype)
    if cluster > 2:
        logits = logits[:3]
    seed = torch.tensor([1, 2])
    ops = (
        simt_ops.top1_confidence,
        simt_ops.row_statistics,
        lambda logits, **options: simt_ops.top1_partial(logits, 1000, **options),
        lambda logits, **options: simt_ops.sample_tokens(logits, seed, **options),
        lambda logits, **options: simt_ops.sample_partial(logits, seed, 64, **options),
    )
    for op in ops:
        expected = op(logits, temperature=0.7, suppress_token=70)
        assert CHOSEN[-1].cluster == 1
        actual = op(logits, temperature=0.7, suppress_token=70, gpu=H200_CLUSTERS)
        assert CHOSEN[-1].cluster == cluster
        for one, other in zip(actual, expected, strict=True):
            assert torch.equal(one.nan_to_num(2.0), other.nan_to_num(2.0))


# More rows than clusters are worth, rows that one block has alone, a GPU without clusters, and ops
# that meet in global memory only
def test_launches_without_clusters():
    logits = random_rows(33, SPLIT_VOCAB, torch.bfloat16)
    seed = torch.tensor([1, 2])
    for run in (
        lambda: simt_ops.top1_confidence(logits, gpu=H200_CLUSTERS),
        lambda: simt_ops.top1_confidence(logits[:2, :2048], gpu=H200_CLUSTERS),
        lambda: simt_ops.top1_confidence(logits[:2], gpu=A100),
        lambda: simt_ops.sample_tokens(logits[:2], seed, top_k=5, gpu=A100),
        lambda: simt_ops.topk_confidence(logits[:2], 3, gpu=H200_CLUSTERS),
    ):
        run()
        assert CHOSEN[-1].cluster == 1


@pytest.mark.parametrize("temperature", [1e-38, 1e-3, 0.7, 5.0, 1e6])
def test_top1_temperature(temperature):
    _, logits = stacked_rows(2049, torch.float32)
    token, confidence = simt_ops.top1_confidence(logits, temperature=temperature)
    expected_token, expected = float64.top1_confidence(logits, temperature)
    assert torch.equal(token, expected_token)
    if temperature >= 1e-3:
        assert_close(confidence, expected, CONFIDENCE_RTOL)


# The offset times the scale is 2^12 to 2^34. That product loses up to 2^9 powers of 2 to rounding,
# and beyond 2^30 the kernels lower the scale.
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("units_per_temperature", [2.0**-12, 0.1, 1, 5, 40, 60, 100, 1000])
def test_top1_common_offset(sign, units_per_temperature):
    offset = 1.3700001e6
    unit = 0.125  # of the last place at the offset
    steps = torch.randint(0, 30, (3, 3000), generator=torch.manual_seed(3))
    steps[1, 1234] = -1
    logits = (sign * offset - unit * steps.double()).float()
    temperature = unit / units_per_temperature
    token, confidence = simt_ops.top1_confidence(logits, temperature=temperature)
    assert_top1(logits, token, confidence, temperature=temperature)
    entropy = simt_ops.row_statistics(logits, temperature=temperature)[3]
    expected = float64.row_statistics(logits, temperature)[3]
    assert_close(entropy, expected, ENTROPY_RTOL, ENTROPY_ATOL)


# First, last, the winner itself, a NaN, a +inf, a tile's edge; on the odd V every second row is
# misaligned
@pytest.mark.parametrize("suppress_token", [0, 3, 6, 2047, 2048, 2048 + 1000])
def test_top1_suppressed_token(suppress_token):
    _, logits = stacked_rows(3049, torch.float16)
    token, confidence = simt_ops.top1_confidence(logits, suppress_token=suppress_token)
    assert_top1(logits, token, confidence, suppress_token=suppress_token)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_top1_strides(dtype):
    for name, logits in strided_copies(random_rows(4, 2100, dtype)).items():
        token, confidence = simt_ops.top1_confidence(logits)
        expected_token, expected = float64.top1_confidence(logits)
        assert torch.equal(token, expected_token), name
        assert_close(confidence, expected, CONFIDENCE_RTOL)


# Alone, in a batch with a different launch shape, at a different alignment: the same bits
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_top1_bits_do_not_depend_on_the_launch(dtype):
    logits = random_rows(16, SPLIT_VOCAB, dtype)  # four waves of four blocks
    _, confidence = simt_ops.top1_confidence(logits, gpu=ONE_MULTIPROCESSOR)
    assert CHOSEN[-1].splits == 1
    for row in range(6):
        _, alone = simt_ops.top1_confidence(logits[row : row + 1].clone())
        assert CHOSEN[-1].splits > 1
        assert torch.equal(alone, confidence[row : row + 1])


# 2^31 elements between rows, through a stride, and expanded rows
def test_top1_far_rows():
    row = random_rows(1, 2100, torch.bfloat16)
    token, confidence = simt_ops.top1_confidence(row.expand(3, 2100))
    assert_top1(row.expand(3, 2100), token, confidence)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [9, 127, 2049, 5000])
@pytest.mark.parametrize("k", [1, 3, 8])
def test_topk_edge_cases(dtype, vocab_size, k):
    _, logits = stacked_rows(vocab_size, dtype)
    tokens, confidences = simt_ops.topk_confidence(logits, k)
    expected_tokens, expected = reference.topk_confidence(logits.double().float(), k)
    assert tokens.tolist() == expected_tokens.tolist()
    probability = float64.softmax_of(logits).gather(-1, tokens)
    broken = expected.isnan()
    # far below the maximum the exponent's own rounding shows
    assert_close(confidences, probability.masked_fill(broken, torch.nan), CONFIDENCE_RTOL, 1e-9)


@pytest.mark.parametrize(("gpu", "splits"), [(H200, 2), (ONE_MULTIPROCESSOR, 1)])
def test_topk_split_rows(gpu, splits):
    _, logits = stacked_rows(SPLIT_VOCAB, torch.bfloat16)
    tokens, _ = simt_ops.topk_confidence(logits, 8, gpu=gpu, suppress_token=70)
    assert CHOSEN[-1].splits == splits
    expected_tokens, _ = reference.topk_confidence(logits, 8, suppress_token=70)
    assert tokens.tolist() == expected_tokens.tolist()


def test_topk_of_all_tokens():
    """k = V: every token is listed, -inf and suppressed ones last with probability 0."""
    logits = torch.tensor([[1.0, -torch.inf, 3.0, 2.0]])
    tokens, confidences = simt_ops.topk_confidence(logits, 4, suppress_token=3)
    assert tokens.tolist() == [[2, 0, 1, 3]]
    assert confidences[0, 2:].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [7, 127, 2049])
@pytest.mark.parametrize("suppress_token", [-1, 1003])
def test_partial_edge_cases(dtype, vocab_size, suppress_token):
    _, logits = stacked_rows(vocab_size, dtype)
    options = {"temperature": 0.7, "suppress_token": suppress_token}
    actual = simt_ops.top1_partial(logits, 1000, **options)
    expected = reference.top1_partial(logits.double(), 1000, **options)
    assert actual[2].tolist() == expected[2].tolist()
    assert_close(actual[0], expected[0], 0)
    assert_close(actual[1], expected[1], 1e-5)


# Shards whose tiles are those of the whole row give the whole row's token, and its confidence
@pytest.mark.parametrize("shards", [1, 2, 4])
def test_merge_of_shards(shards):
    _, logits = stacked_rows(4 * 2048, torch.float32)
    size = logits.shape[1] // shards
    for temperature in (1.0, 0.6):
        parts = [
            simt_ops.top1_partial(
                logits[:, s * size : (s + 1) * size], s * size, temperature=temperature
            )
            for s in range(shards)
        ]
        token, confidence = simt_ops.top1_merge(
            *(torch.stack(each) for each in zip(*parts, strict=True)), temperature=temperature
        )
        assert_top1(logits, token, confidence, temperature=temperature)


def seeds(num_rows, offset=0):
    return torch.tensor([1234567890123456789, offset]), torch.tensor(
        [[-5 - r, 2**40 + r] for r in range(num_rows)]
    )


# Random and reversed orders of threads, warps and blocks; few and many resident blocks
@pytest.mark.parametrize(
    ("name", "seed", "resident"),
    [
        ("in order", 0, 4),
        ("reversed", 0, 1),
        ("reversed", 0, 4),
        ("random", 0, 1),
        ("random", 1, 4),
    ],
)
def test_rows_in_any_order(name, seed, resident):
    logits = random_rows(2, SPLIT_VOCAB, torch.bfloat16)
    logits[1, 5] = torch.nan
    noise, _ = seeds(2)
    expected = [
        simt_ops.top1_confidence(logits),
        simt_ops.top1_confidence(logits),
        simt_ops.topk_confidence(logits, 3),
        simt_ops.sample_tokens(logits, noise),
        simt_ops.sample_tokens(logits, noise, top_k=3000, top_p=0.9),
    ]
    with simt_ops.order(name, seed, resident):
        actual = [
            simt_ops.top1_confidence(logits),
            simt_ops.top1_confidence(logits, gpu=H200_CLUSTERS),
            simt_ops.topk_confidence(logits, 3),
            simt_ops.sample_tokens(logits, noise),
            simt_ops.sample_tokens(logits, noise, top_k=3000, top_p=0.9),
        ]
    assert CHOSEN[-1].splits > 1
    for pair, other in zip(actual, expected, strict=True):
        assert torch.equal(pair[0], other[0])
        assert torch.equal(pair[1].nan_to_num(2.0), other[1].nan_to_num(2.0))


# An older GPU changes the number of splits, nothing else
def test_another_gpu():
    logits = random_rows(150, 64, torch.float32)
    for gpu in (H200, A100):
        assert_top1(logits, *simt_ops.top1_confidence(logits, gpu=gpu))
