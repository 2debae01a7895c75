"""The CUDA kernels over vocabulary rows, run on the CPU: top-1, top-k, partial, merge, sampling."""

import float64
import pytest
import simt_ops
import torch
from cases import DTYPES, SMALL_VOCABS, stacked_rows, strided_copies
from simt_ops import A100, CHOSEN, H200, H200_CLUSTERS, ONE_MULTIPROCESSOR
from tolerances import (
    CONFIDENCE_RTOL,
    ENTROPY_ATOL,
    ENTROPY_RTOL,
    REFERENCE_RTOL,
    assert_close,
)

from dmax_kernels import reference
from dmax_kernels.reference.sample import kept_tokens

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
    ops = [
        (4, lambda: simt_ops.top1_confidence(logits, gpu=gpu)),
        (3, lambda: simt_ops.row_statistics(logits, gpu=gpu)),
        (3, lambda: simt_ops.sample_tokens(logits, seed, gpu=gpu)),
        (2, lambda: simt_ops.sample_tokens(logits, seed, top_k=5, gpu=gpu)),
    ]
    for blocks_per_multiprocessor, run in ops:
        run()
        assert CHOSEN[-1].splits == blocks_per_multiprocessor * multiprocessors // rows


# Beyond 3,008 tiles a block's shared memory cannot hold a row's partial results: split even at
# many rows per multiprocessor
def test_top1_vocabulary_beyond_shared_memory():
    logits = random_rows(5, 3009 * 1024, torch.float32)
    logits[:, 2_999_999] = 40.0
    token, _ = simt_ops.top1_confidence(logits, gpu=ONE_MULTIPROCESSOR)
    assert CHOSEN[-1].splits == 2
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
        lambda: simt_ops.sample_tokens(logits[:2], seed, top_k=5, gpu=H200_CLUSTERS),
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
    logits = random_rows(6, SPLIT_VOCAB, dtype)
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


def assert_same_samples(actual, logits, seed, **options):
    """The reference's tokens and probabilities. The noise has the same bits, and no two scores of
    these seeds lie within rounding of each other.
    """
    expected = reference.sample_tokens(logits, seed, **options)
    assert actual.token.tolist() == expected.token.tolist()
    for mine, theirs in zip(actual[1:], expected[1:], strict=True):
        assert_close(mine, theirs, REFERENCE_RTOL, 1e-9)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [1, 7, 127, 2049, 5000])
def test_sample_edge_cases(dtype, vocab_size):
    _, logits = stacked_rows(vocab_size, dtype)
    for seed in seeds(len(logits)):
        sample = simt_ops.sample_tokens(logits, seed)
        assert_same_samples(sample, logits, seed)
        softmax = float64.softmax_of(logits)
        expected = softmax.gather(-1, sample.token.unsqueeze(-1)).squeeze(-1)
        assert_close(sample.probability, expected, CONFIDENCE_RTOL, 1e-9)
        assert_close(sample.top1_probability, softmax.amax(dim=-1), CONFIDENCE_RTOL)


# Rows of random logits at temperatures that leave one draw tile, some and all
@pytest.mark.parametrize("temperature", [0.01, 0.7, 1.0, 30.0])
@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_sample_tokens_are_the_references(temperature, scale):
    logits = random_rows(24, 4500, torch.bfloat16, scale=scale)
    for number in range(2):
        seed, _ = seeds(24, number)
        options = {"temperature": temperature, "suppress_token": 100}
        sample = simt_ops.sample_tokens(logits, seed, **options)
        assert sample.token.tolist() == reference.sample_tokens(logits, seed, **options)[0].tolist()


@pytest.mark.parametrize(("gpu", "splits"), [(H200, 2), (ONE_MULTIPROCESSOR, 1)])
def test_sample_split_rows(gpu, splits):
    _, logits = stacked_rows(SPLIT_VOCAB, torch.bfloat16)
    seed, _ = seeds(len(logits))
    sample = simt_ops.sample_tokens(logits, seed, gpu=gpu)
    assert CHOSEN[-1].splits == splits
    assert_same_samples(sample, logits, seed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sample_strides(dtype):
    for name, logits in strided_copies(random_rows(4, 2100, dtype)).items():
        seed, _ = seeds(4)
        expected = reference.sample_tokens(logits, seed, top_p=0.9)
        sample = simt_ops.sample_tokens(logits, seed, top_p=0.9)
        assert sample.token.tolist() == expected.token.tolist(), name


# Shards of one draw tile and of many, that begin anywhere in a tile of the whole row; the tokens
# and the scores of the unsharded draw
@pytest.mark.parametrize(
    ("dtype", "widths"),
    [
        (torch.float32, [2049]),
        (torch.float32, [64, 1088, 64, 1022]),
        (torch.bfloat16, [960, 1049]),
        (torch.bfloat16, [9 * 2048 + 64, 700]),
        (torch.float16, [64, SPLIT_VOCAB]),
    ],
    ids=str,
)
def test_sample_of_shards(dtype, widths):
    _, logits = stacked_rows(sum(widths), dtype)
    for temperature, seed in zip((1.0, 0.3), seeds(len(logits)), strict=True):
        options = {"temperature": temperature, "suppress_token": 70}
        starts = [sum(widths[:i]) for i in range(len(widths))]
        parts = [
            simt_ops.sample_partial(shard, seed, start, **options)
            for shard, start in zip(logits.split(widths, dim=1), starts, strict=True)
        ]
        stacked = [torch.stack(each) for each in zip(*parts, strict=True)]
        token, probability = simt_ops.sample_merge(*stacked, temperature=temperature)
        expected = simt_ops.sample_tokens(logits, seed, **options)
        assert token.tolist() == expected.token.tolist()
        assert_close(probability, expected.probability, 2 * CONFIDENCE_RTOL, 1e-9)


# A draw tile's score has the same bits on every shard that holds it
def test_sample_scores_do_not_depend_on_the_shard():
    logits = random_rows(5, 3 * 2048, torch.bfloat16)
    seed, _ = seeds(5)
    score = simt_ops.sample_partial(logits, seed, 0)[3]
    starts = [0, 64, 1984, 3 * 2048 - 64]
    shards = [logits[:, a:b] for a, b in zip(starts, [*starts[1:], 3 * 2048], strict=True)]
    scores = [
        simt_ops.sample_partial(shard, seed, start)[3]
        for shard, start in zip(shards, starts, strict=True)
    ]
    assert torch.equal(torch.stack(scores).amax(dim=0), score)


# At temperatures so low that the kernels lower the scale
@pytest.mark.parametrize("options", [{}, {"top_p": 0.9}, {"top_k": 7}])
def test_sample_at_a_tiny_temperature(options):
    logits = random_rows(5, 3000)
    seed, _ = seeds(5)
    sample = simt_ops.sample_tokens(logits, seed, temperature=1e-20, **options)
    assert torch.equal(sample.token, logits.argmax(dim=-1))
    for each in sample[1:]:
        assert_close(each, torch.ones(5), CONFIDENCE_RTOL)


def test_sample_greedy():
    _, logits = stacked_rows(2049, torch.bfloat16)
    seed, _ = seeds(len(logits))
    sample = simt_ops.sample_tokens(logits, seed, temperature=0.0, suppress_token=3, top_k=2)
    token, confidence = simt_ops.top1_confidence(logits, suppress_token=3)
    assert torch.equal(sample.token, token)
    for each in sample[1:]:
        assert torch.equal(each.nan_to_num(2.0), confidence.nan_to_num(2.0))


# ---- Filters, masks, options per row ----

FILTERS = {
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.2},
    "all": {"top_k": 50, "top_p": 0.9, "min_p": 0.01, "temperature": 0.8},
    "nearly all": {"top_k": 4900, "top_p": 0.9999},
}


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize(
    ("dtype", "vocab_size"),
    [(torch.float32, 7), (torch.float16, 127), (torch.bfloat16, 5000), (torch.float32, 2049)],
    ids=str,
)
def test_sample_filters(filters, dtype, vocab_size):
    _, logits = stacked_rows(vocab_size, dtype)
    seed, _ = seeds(len(logits))
    options = {**FILTERS[filters], "suppress_token": min(5, vocab_size - 1)}
    sample = simt_ops.sample_tokens(logits, seed, **options)
    assert_same_samples(sample, logits, seed, **options)


# What takes the search past its list of 2,048 tokens: flat rows, rows of one value or two, 16-bit
# rows with few values, and rows whose other values all lie in one bin, far below the maximum
def long_rows(kind):
    noise = random_rows(3, SPLIT_VOCAB, scale=1.0)
    if kind == "constant":
        return torch.zeros(3, SPLIT_VOCAB)
    if kind == "two values":
        return (noise > 0).float()
    if kind == "16 bits":
        return (noise / 2).bfloat16()
    if kind == "far maximum":
        noise[:, 77] = 1e6
    return noise


@pytest.mark.parametrize("kind", ["flat", "constant", "two values", "16 bits", "far maximum"])
def test_sample_filters_of_long_rows(kind):
    logits = long_rows(kind)
    seed, _ = seeds(3)
    for options in ({"top_k": 5000}, {"top_p": 0.9}, {"top_k": 6000, "top_p": 0.5}):
        samples = [
            simt_ops.sample_tokens(logits, seed, **options, gpu=gpu)
            for gpu in (H200, ONE_MULTIPROCESSOR)
        ]
        assert_same_samples(samples[0], logits, seed, **options)
        # One block per row or several: the same bits
        for a, b in zip(*samples, strict=True):
            assert torch.equal(a, b)


# Every token of equal logits counts by its id: of 9 the first 4, 5 or 6
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sample_filters_break_ties_by_id(dtype):
    logits = torch.full((60, 1000), -5.0, dtype=dtype)
    logits[:, 100:1000:100] = 2.0
    seed, _ = seeds(60)
    for kept, options in ((4, {"top_k": 4}), (5, {"top_p": 0.5, "top_k": 9})):
        sample = simt_ops.sample_tokens(logits, seed, **options)
        assert sorted(set(sample.token.tolist())) == list(range(100, 100 * kept + 1, 100))
        assert_close(sample.probability, torch.full((60,), 1 / kept), CONFIDENCE_RTOL)


def random_mask(num_rows, vocab_size, density=0.5):
    """(allowed [rows, words], the same as bool [rows, V]); garbage in the bits past the end."""
    words = -(-vocab_size // 32)
    bits = torch.rand(num_rows, 32 * words, generator=torch.manual_seed(8)) < density
    value = (bits.view(num_rows, words, 32).long() << torch.arange(32)).sum(dim=-1)
    value = torch.where(value >= 2**31, value - 2**32, value)
    return value.int(), bits[:, :vocab_size]


@pytest.mark.parametrize(
    ("dtype", "vocab_size"), [(torch.float32, 129), (torch.bfloat16, 5000)], ids=str
)
@pytest.mark.parametrize("options", [{}, {"top_k": 20, "top_p": 0.8}, {"temperature": 0.0}])
def test_sample_allowed(dtype, vocab_size, options):
    _, logits = stacked_rows(vocab_size, dtype)
    seed, _ = seeds(len(logits))
    for rows in (len(logits), 1):
        allowed, bits = random_mask(rows, vocab_size)
        if rows > 1:
            allowed[3] = 0  # nothing allowed: as all -inf
        sample = simt_ops.sample_tokens(logits, seed, allowed=allowed, **options)
        assert_same_samples(sample, logits, seed, allowed=allowed, **options)
        defined = sample.probability.isfinite()
        bits = bits.expand(len(logits), -1)
        assert bits.gather(-1, sample.token.unsqueeze(-1)).squeeze(-1)[defined].all()
        assert rows == 1 or (sample.token[3] == 0 and sample.probability[3].isnan())


def test_sample_options_per_row():
    logits = random_rows(12, 3000, torch.bfloat16)
    seed, _ = seeds(12)
    options = {
        "temperature": torch.tensor([1.0, 0.0, 0.5, 1.0, 2.0, 1.0, 1.0, 0.0, 0.3, 1.0, 5.0, 1.0]),
        "top_k": torch.tensor([0, 5, 0, 7, 40, 0, 1, 0, 0, 3000, 2900, 0]),
        "top_p": torch.tensor([1.0, 1.0, 0.9, 1.0, 0.5, 0.1, 1.0, 0.5, 1.0, 1.0, 0.8, 1.0]),
        "min_p": torch.tensor([0.0, 0.0, 0.0, 0.1, 0.0, 0.0, 0.0, 0.0, 0.5, 0.0, 0.0, 1.0]),
    }
    sample = simt_ops.sample_tokens(logits, seed, **options)
    assert_same_samples(sample, logits, seed, **options)
    # A row of its own and the same options for a whole call: the same bits
    for row in range(12):
        own = {name: each[row].item() for name, each in options.items()}
        alone = simt_ops.sample_tokens(
            logits[row : row + 1],
            torch.tensor([[9, row]]),
            **own,
            allowed=torch.tensor([[-1] * 94]),
        )
        pairs = torch.tensor([[9, i] for i in range(12)])
        together = simt_ops.sample_tokens(logits, pairs, **options)
        for a, b in zip(alone, together, strict=True):
            assert torch.equal(a, b[row : row + 1])


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", -1.0), ("temperature", 1e31), ("temperature", torch.nan), ("top_k", -1.0),
     ("top_k", 2.5), ("top_p", 0.0), ("top_p", 1.5), ("min_p", -0.1), ("min_p", 1.1),
     ("min_p", torch.nan)],
)  # fmt: skip
def test_sample_options_out_of_range(name, value):
    logits = random_rows(3, 300)
    seed, _ = seeds(3)
    options = {"temperature": 1.0, "top_k": 0.0, "top_p": 1.0, "min_p": 0.0}
    good = simt_ops.sample_tokens(logits, seed, **options)
    bad = torch.tensor([options[name], value, options[name]])
    sample = simt_ops.sample_tokens(logits, seed, **{**options, name: bad})
    assert sample.token[1] == 0
    assert all(each[1].isnan() for each in sample[1:])
    for row in (0, 2):
        assert sample.token[row] == good.token[row]


# 200 logits in three draw tiles and a cut one, without filters and with each. Counts of at least 5
# expected, the rest as one class; chi-squared within five standard deviations
@pytest.mark.parametrize("options", [{}, {"top_k": 30}, {"top_p": 0.8}, {"min_p": 0.1}])
def test_sample_distribution(options):
    draws = 1500 if not options else 400
    logits = 2 * torch.randn(200, generator=torch.manual_seed(6))
    seed = torch.tensor([5, 9])
    sample = simt_ops.sample_tokens(logits.expand(draws, 200), seed, **options)
    columns = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | options
    kept = kept_tokens(logits[None], *(torch.tensor([[float(c)]]) for c in columns.values()))[0]
    expected = draws * float64.softmax_of(logits.masked_fill(~kept, -torch.inf)[None])[0]
    counts = torch.bincount(sample.token, minlength=200).double()
    assert (counts[~kept] == 0).all()
    often = expected >= 5
    seen = torch.cat([counts[often], counts[~often].sum()[None]])
    law = torch.cat([expected[often], expected[~often].sum()[None]])
    seen, law = seen[law > 0], law[law > 0]
    freedom = len(law) - 1
    chi_squared = ((seen - law).square() / law).sum().item()
    assert abs(chi_squared - freedom) < 5 * (2 * freedom) ** 0.5


# A peaked row is read once, and of the rest only the draw tiles around its best tokens. A flat row
# is read a few times.
def test_sample_filters_read_a_peaked_row_once():
    vocab_size = 40 * 2048
    logits = random_rows(1, vocab_size, torch.bfloat16, scale=1.0)
    logits[:, torch.arange(20) * 3001] += 12
    seed, _ = seeds(1)
    simt_ops.bytes_read()
    simt_ops.sample_tokens(logits, seed)
    assert simt_ops.bytes_read() == logits.nbytes
    for options in ({"top_k": 20}, {"top_p": 0.95}, {"min_p": 0.01}, {"top_k": 50, "top_p": 0.9}):
        simt_ops.sample_tokens(logits, seed, **options)
        assert simt_ops.bytes_read() < 1.15 * logits.nbytes, options
    simt_ops.sample_tokens(logits * 0, seed, top_p=0.9)
    assert simt_ops.bytes_read() < 7 * logits.nbytes


# Draw tiles without an allowed id are not read
def test_sample_reads_only_what_is_allowed():
    logits = random_rows(2, 8 * 2048, torch.bfloat16)
    allowed = torch.zeros(1, 512, dtype=torch.int32)
    allowed[0, [7, 300]] = 1 << 5
    seed, _ = seeds(2)
    simt_ops.bytes_read()
    sample = simt_ops.sample_tokens(logits, seed, allowed=allowed)
    assert set(sample.token.tolist()) <= {7 * 32 + 5, 300 * 32 + 5}
    assert simt_ops.bytes_read() == 2 * 2 * 16


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
