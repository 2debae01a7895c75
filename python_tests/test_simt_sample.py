"""The CUDA kernels that sample, run on the CPU: draws, filters, masks, options per row, shards."""

import float64
import pytest
import simt_ops
import torch
from cases import DTYPES, stacked_rows, strided_copies
from masks import random_mask
from simt_ops import A100, A100_ONE_MULTIPROCESSOR, CHOSEN, H200, ONE_MULTIPROCESSOR
from test_simt_rows import SPLIT_VOCAB, random_rows, seeds
from tolerances import CONFIDENCE_RTOL, REFERENCE_RTOL, assert_close

from dmax_kernels import reference
from dmax_kernels.reference.sample import kept_tokens


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
    # Of top_k's list of a bin, top_p's cut is in it or before it
    for options in (
        {"top_k": 5000},
        {"top_p": 0.9},
        {"top_k": 6000, "top_p": 0.5},
        {"top_k": 6000, "top_p": 0.9999},
    ):
        # A cluster of blocks has the row, or its last block, or the one block that reads it
        for gpu, cluster in ((H200, True), (A100, False), (A100_ONE_MULTIPROCESSOR, False)):
            sample = simt_ops.sample_tokens(logits, seed, **options, gpu=gpu)
            assert (CHOSEN[-1].cluster > 1) == cluster
            assert_same_samples(sample, logits, seed, **options)


# The draw tiles' maxima reach a small part of a flat row's mass; for 0.1 it takes more than 2,048
# of them, so that bins follow. The mass of the tiles below the bound counts for the target, once.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sample_top_p_counts_what_lies_below_the_bound(dtype):
    logits = random_rows(2, 160_001, dtype, scale=1.0)
    seed, _ = seeds(2)
    for top_p in (0.05, 0.09, 0.1):
        for gpu in (H200, A100_ONE_MULTIPROCESSOR):
            sample = simt_ops.sample_tokens(logits, seed, top_p=top_p, gpu=gpu)
            assert_same_samples(sample, logits, seed, top_p=top_p)


# On a GPU of nine multiprocessors four clusters of two blocks run at once, and one of eight: the
# number of blocks follows the number of rows, and no bit does
def test_sample_filters_do_not_depend_on_the_number_of_rows():
    gpu = (9, *H200[1:])
    logits = random_rows(3, 33 * 2048, torch.bfloat16, scale=1.0)
    seeds_of_rows = torch.tensor([[7, 1], [7, 2], [7, 3]])
    for options in ({"top_p": 0.8}, {"top_k": 40, "min_p": 0.02}):
        all_rows = simt_ops.sample_tokens(logits, seeds_of_rows, **options, gpu=gpu)
        of_all = CHOSEN[-1].cluster
        alone = simt_ops.sample_tokens(logits[:1], seeds_of_rows[:1], **options, gpu=gpu)
        assert (CHOSEN[-1].cluster, of_all) == (8, 2)
        for a, b in zip(alone, all_rows, strict=True):
            assert torch.equal(a, b[:1])


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


@pytest.mark.parametrize(
    ("dtype", "vocab_size"),
    [(torch.float32, 129), (torch.bfloat16, 5000), (torch.float32, SPLIT_VOCAB)],
    ids=str,
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


# A cluster of blocks reads every row once. A single block reads of a peaked row only the draw tiles
# around its best tokens again, and a flat row a few times.
@pytest.mark.parametrize(("gpu", "peaked", "flat"), [(H200, 1.0, 1.0), (A100, 1.15, 7.0)])
def test_how_often_filters_read_a_row(gpu, peaked, flat):
    vocab_size = 40 * 2048
    logits = random_rows(1, vocab_size, torch.bfloat16, scale=1.0)
    logits[:, torch.arange(20) * 3001] += 12
    seed, _ = seeds(1)
    simt_ops.bytes_read()
    simt_ops.sample_tokens(logits, seed, gpu=gpu)
    assert simt_ops.bytes_read() == logits.nbytes
    for options in ({"top_k": 20}, {"top_p": 0.95}, {"min_p": 0.01}, {"top_k": 50, "top_p": 0.9}):
        simt_ops.sample_tokens(logits, seed, **options, gpu=gpu)
        assert simt_ops.bytes_read() <= peaked * logits.nbytes, options
    simt_ops.sample_tokens(logits * 0, seed, top_p=0.9, gpu=gpu)
    assert simt_ops.bytes_read() <= flat * logits.nbytes


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
