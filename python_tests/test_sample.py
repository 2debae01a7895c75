"""sample_tokens and its vocabulary shards: the generator, the distribution, the edges.

CUDA's are in test_simt_sample.py.
"""

import math

import float64
import pytest
import torch
from cases import DTYPES, SMALL_VOCABS, stacked_rows, strided_copies
from draws import assert_drawn
from tolerances import CONFIDENCE_RTOL, REFERENCE_RTOL, assert_close
from triton_device import triton

import dmax_kernels
from dmax_kernels import reference
from dmax_kernels.reference.sample import philox4x32
from dmax_kernels.reference.top1 import visible_logits
from dmax_kernels.triton.launch import TILE

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's inf - inf

BACKENDS = {"reference": reference, "cpu": dmax_kernels, "triton": triton}
RTOL = {"reference": REFERENCE_RTOL, "cpu": 2 * CONFIDENCE_RTOL, "triton": 2 * CONFIDENCE_RTOL}
everywhere = pytest.mark.parametrize("backend", BACKENDS)
compiled = pytest.mark.parametrize("backend", ["cpu", "triton"])
WIDE = 2 * TILE + 801
SEED = torch.tensor([1234567890123456789, 42])


def test_philox_known_answers():
    """The vectors published with Random123 (kat_vectors, philox4x32 with 10 rounds)."""
    cases = [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (
            [0xFFFFFFFF] * 4,
            [0xFFFFFFFF] * 2,
            [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
        ),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ]
    for counter, key, expected in cases:
        words = philox4x32(
            tuple(torch.tensor([c]) for c in counter), tuple(torch.tensor([k]) for k in key)
        )
        assert [int(word) for word in words] == expected


def assert_same_samples(backend, logits, seed, temperature=1.0, suppress_token=-1):
    """Equal to the reference, unless two of its scores lie within rounding of each other."""
    options = {"temperature": temperature, "suppress_token": suppress_token}
    token, *floats = BACKENDS[backend].sample_tokens(logits, seed, **options)
    expected, *expected_floats = reference.sample_tokens(logits, seed, **options)
    x = visible_logits(logits, suppress_token) / temperature
    # 1e-5, and the rounding of a large x + noise
    assert_drawn(token, x, seed, 1e-5 + 1e-6 * x.nan_to_num(0, 0, 0).abs().amax(dim=-1))
    same = token == expected
    assert (~same).sum() <= 0.001 * max(same.numel(), 1000)
    for actual, wanted in zip(floats, expected_floats, strict=True):
        assert_close(actual[same], wanted[same], REFERENCE_RTOL, atol=1e-37)


# A seed per call, where the row enters the counter; and large, negative ones per row
@pytest.mark.parametrize(
    ("backend", "vocab_size", "dtype", "per_row"),
    [("cpu", v, d, v in (127, 5000)) for v in SMALL_VOCABS for d in DTYPES]
    + [("triton", v, torch.float32, v in (7, WIDE)) for v in (1, 7, 127, WIDE)],
)
def test_edge_cases(backend, vocab_size, dtype, per_row):
    _, logits = stacked_rows(vocab_size, dtype)
    seed = SEED
    if per_row:
        seed = torch.randint(-(2**62), 2**62, (len(logits), 2), generator=torch.manual_seed(2))
    assert_same_samples(backend, logits, seed, temperature=0.3, suppress_token=vocab_size - 1)
    if backend == "cpu":
        assert_same_samples(backend, logits, seed)


@pytest.mark.parametrize("num_rows", [1, 8])
def test_large_vocabulary(num_rows):
    logits = 2 * torch.randn(num_rows, 157184, generator=torch.manual_seed(4))
    assert_same_samples("cpu", logits, SEED)
    assert_same_samples("cpu", logits, SEED, temperature=1.7, suppress_token=156895)


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_long_flat_rows(offset):
    """Most draw tiles are ruled out by their uniform numbers alone, with a margin for roundings."""
    logits = 0.1 * torch.randn(48, 30_000, generator=torch.manual_seed(6)) + offset
    assert_same_samples("cpu", logits, SEED)
    assert_same_samples("cpu", logits[:8], SEED, temperature=0.05)
    # The linear op goes through groups of tokens, and rules out by what the groups before reached
    same = logits[:1].expand(48, -1)
    drawn = dmax_kernels.linear_sample_tokens(torch.ones(48, 1), logits[0, :, None], SEED)
    assert torch.equal(drawn.token, dmax_kernels.sample_tokens(same, SEED).token)


@everywhere
def test_undefined_rows(backend):
    names, logits = stacked_rows(127 if backend == "triton" else 5000, torch.float32)
    token, *floats = BACKENDS[backend].sample_tokens(logits, SEED)
    expected, _ = float64.top1_confidence(logits)
    for i, name in enumerate(names):
        if "nan" in name or name in ("inf", "infs", "all_minus_inf"):
            assert token[i] == expected[i], name
            assert all(each[i].isnan() for each in floats), name
        else:
            assert logits[i, token[i]] > -torch.inf, name
            assert floats[0][i] > 0, name


# 200 tokens in four tiles, one of them without mass; G-test at 199 - 1 degrees of freedom, 100,000
# draws. The seeds are fixed, so the test either always passes or always fails.
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_distribution(backend, temperature):
    draws, vocab_size = 100_000, 200
    logits = torch.randn(vocab_size, generator=torch.manual_seed(5))
    logits[17] = -torch.inf
    token = BACKENDS[backend].sample_tokens(
        logits.expand(draws, vocab_size), torch.tensor([99, 0]), temperature=temperature
    )[0]
    counts = torch.bincount(token, minlength=vocab_size).double()
    expected = draws * float64.softmax_of(logits, temperature)
    assert counts[17] == 0
    seen = counts > 0
    g = 2 * (counts[seen] * (counts[seen] / expected[seen]).log()).sum().item()
    # 198 degrees of freedom: mean 198, standard deviation 19.9
    assert 198 - 4 * math.sqrt(396) < g < 198 + 5 * math.sqrt(396)


def test_rare_tokens_are_sampled_in_proportion():
    """Large vocabulary, one token with half of the mass: noise of 24 bits would tie in the tail."""
    draws, vocab_size = 4000, 20000
    logits = torch.zeros(vocab_size)
    logits[123] = math.log(vocab_size - 1)
    token = dmax_kernels.sample_tokens(logits.expand(draws, vocab_size), torch.tensor([7, 7])).token
    share = (token == 123).double().mean().item()
    assert abs(share - 0.5) < 5 * 0.5 / math.sqrt(draws)
    rest = token[token != 123].double()
    assert abs(rest.mean().item() / vocab_size - 0.5) < 5 * 0.29 / math.sqrt(len(rest))


@everywhere
def test_greedy_is_top1(backend):
    functions = BACKENDS[backend]
    _, logits = stacked_rows(127 if backend == "triton" else 5000, torch.bfloat16)
    token, *floats = functions.sample_tokens(logits, SEED, temperature=0.0, suppress_token=3)
    expected, confidence = functions.top1_confidence(logits, suppress_token=3)
    assert torch.equal(token, expected)
    for each in floats:
        assert_close(each, confidence, RTOL[backend])


def test_tiny_temperature_is_greedy():
    logits = torch.randn(50, 300, generator=torch.manual_seed(9))
    token, *floats = dmax_kernels.sample_tokens(logits, SEED, temperature=1e-20)
    assert torch.equal(token, logits.argmax(-1))
    assert all((each == 1).all() for each in floats)


@everywhere
def test_seed_per_row_does_not_depend_on_the_batch(backend):
    sample_tokens = BACKENDS[backend].sample_tokens
    logits = torch.randn(6, 500, generator=torch.manual_seed(10))
    seeds = torch.stack([torch.arange(6) + 100, torch.arange(6) * 2**33], dim=1)
    token = sample_tokens(logits, seeds)[0]
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    assert torch.equal(sample_tokens(logits[order], seeds[order])[0], token[order])
    for i in range(6):
        assert sample_tokens(logits[i : i + 1], seeds[i : i + 1])[0] == token[i]


def test_every_part_of_the_key_matters():
    logits = torch.zeros(64, 1000)
    draws = [
        dmax_kernels.sample_tokens(logits, torch.tensor(seed))[0]
        for seed in ([1, 0], [2, 0], [1 + 2**32, 0], [1, 1], [1, 2**32], [-1, -1])
    ]
    for i, first in enumerate(draws):
        assert first.unique().numel() > 50  # the row matters too
        for second in draws[:i]:
            assert (first == second).sum() < 5
    assert torch.equal(dmax_kernels.sample_tokens(logits, torch.tensor([1, 0]))[0], draws[0])


def test_strides_threads_and_shapes():
    _, logits = stacked_rows(2049, torch.float32)
    expected = dmax_kernels.sample_tokens(logits, SEED).token
    for name, copy in strided_copies(logits).items():
        assert torch.equal(dmax_kernels.sample_tokens(copy, SEED)[0], expected), name
    for functions in BACKENDS.values():
        assert functions.sample_tokens(torch.ones(0, 3, 9), SEED)[0].shape == (0, 3)
        assert functions.sample_tokens(torch.ones(2, 0, 9), SEED)[0].shape == (2, 0)
        assert functions.sample_tokens(torch.ones(9), SEED)[0].shape == ()


# ---- Vocabulary shards: however the vocabulary is cut, one sample


def sharded_sample(functions, logits, seed, widths, **options):
    starts = [sum(widths[:i]) for i in range(len(widths))]
    partials = [
        functions.sample_partial(shard, seed, start, **options)
        for shard, start in zip(logits.split(widths, dim=-1), starts, strict=True)
    ]
    stacked = (torch.stack(field) for field in zip(*partials, strict=True))
    return functions.sample_merge(*stacked, temperature=options.get("temperature", 1.0))


# One shard, halves, a single tile and one of few tokens at the end, tiles that lie differently in
# the CPU's and Triton's larger ones; every edge case, in every dtype
@pytest.mark.parametrize(
    ("backend", "dtype", "widths"),
    [
        (b, d, w)
        for b in ("reference", "cpu")
        for d in DTYPES
        for w in ([5000], [2560, 2440], [64, 2112, 64, 832, 1928], [4928, 64, 8])
    ]
    + [("triton", torch.float32, w) for w in ([64, 64, 5], [TILE + 64, 127])],
    ids=str,
)
def test_sharded_equals_unsharded(backend, dtype, widths):
    functions = BACKENDS[backend]
    names, logits = stacked_rows(sum(widths), dtype)
    for options in ({"temperature": 0.3, "suppress_token": 5}, {}):
        if backend == "triton" and not options:
            continue  # the interpreter takes seconds
        token, probability = sharded_sample(functions, logits, SEED, widths, **options)
        expected, expected_probability, *_ = functions.sample_tokens(logits, SEED, **options)
        assert not [names[i] for i in (token != expected).nonzero()[:, 0]]
        assert_close(probability, expected_probability, RTOL[backend], atol=1e-37)


def test_many_draws():
    """5,000 rows of flat logits, where every id can win; the same at a seed per row."""
    logits = torch.randn(5000, 130, generator=torch.manual_seed(1))
    per_row = torch.stack([torch.arange(5000) * 2**40, -torch.arange(5000)], dim=1)
    for seed in (SEED, per_row):
        expected = dmax_kernels.sample_tokens(logits, seed).token
        token, _ = sharded_sample(dmax_kernels, logits, seed, [64, 64, 2])
        assert torch.equal(token, expected)
        assert token.unique().numel() > 100


@compiled
def test_ids_far_up(backend):
    """The noise is that of the id in the whole vocabulary, up to the last one."""
    logits, start = torch.zeros(3, 64), 2**31 - 64
    *_, token, score, _ = BACKENDS[backend].sample_partial(logits, SEED, start)
    *_, expected, expected_score, _ = reference.sample_partial(logits, SEED, start)
    assert torch.equal(token, expected)
    assert_close(score, expected_score, 1e-5)
    assert (token >= start).all()


@everywhere
def test_shard_without_mass(backend):
    functions = BACKENDS[backend]
    logits = torch.randn(6, 64)
    padded = torch.cat([logits, torch.full((6, 24), -torch.inf)], dim=1)
    maximum, sum_exp, token, score, weight = functions.sample_partial(padded[:, 64:], SEED, 64)
    assert (maximum == -torch.inf).all()
    assert (score == -torch.inf).all()
    assert (sum_exp == 0).all()
    assert (weight == 0).all()
    assert (token == 64).all()
    token, _ = sharded_sample(functions, padded, SEED, [64, 24])
    assert torch.equal(token, functions.sample_tokens(logits, SEED)[0])


@compiled
def test_shapes_of_shards(backend):
    functions = BACKENDS[backend]
    partials = functions.sample_partial(torch.randn(2, 3, 7), SEED, 64)
    assert all(t.shape == (2, 3) for t in partials)
    token, probability = functions.sample_merge(*(torch.stack([t, t]) for t in partials))
    assert token.shape == probability.shape == (2, 3)
    assert functions.sample_partial(torch.randn(0, 7), SEED, 0)[0].shape == (0,)


F32, I64 = torch.ones(2, 3), torch.ones(2, 3).long()


@pytest.mark.parametrize(
    ("op", "arguments", "options", "message"),
    [
        ("sample_tokens", (F32, F32[0, :2]), {}, "seed must be int64, got float32"),
        ("sample_tokens", (F32, I64[0]), {}, r"seed must have shape \[2\] .*, got \[3\]"),
        ("sample_tokens", (F32, I64[:, :2].repeat(2, 1)), {}, r"seed must have shape \[2, 2\]"),
        ("sample_tokens", (F32, SEED), {"temperature": -1.0}, r"temperature must be 0 \(greedy"),
        ("sample_tokens", (F32, SEED), {"suppress_token": 3}, "suppress_token must be .*, got 3"),
        ("sample_tokens", (F32.int(), SEED), {}, "logits must be float32.*, got int32"),
        ("sample_partial", (F32, SEED, -1), {}, "vocab_start must be .* -1"),
        ("sample_partial", (F32, SEED, 63), {}, "vocab_start must be a multiple of 64, .*, got 63"),
        (
            "sample_partial",
            (F32, SEED, 2**31),
            {},
            "token ids must be below 2147483648, got a shard of 3 from 2147483648",
        ),
        ("sample_partial", (I64, SEED, 0), {}, "logits_shard must be float32"),
        ("sample_partial", (F32, F32, 0), {}, "seed must be int64"),
        ("sample_partial", (F32, SEED, 0), {"temperature": 0}, "temperature must be at least 1e-3"),
        ("sample_merge", (F32, F32, I64, F32[:1], F32), {}, r"score must have shape \[2, 3\]"),
        ("sample_merge", (F32, F32, F32, F32, F32), {}, "token must be int64"),
        ("sample_merge", (F32, F32, I64, F32, I64), {}, "weight must be float32"),
        (
            "sample_merge",
            (F32[:0], F32[:0], I64[:0], F32[:0], F32[:0]),
            {},
            r"maximum must be \[S, ",
        ),
        (
            "sample_merge",
            (F32, F32, I64, F32, F32),
            {"temperature": -1.0},
            "temperature must be at least 1e-30",
        ),
    ],
)
def test_bad_input(op, arguments, options, message):
    with pytest.raises(RuntimeError, match=f"^{op}: {message}"):
        getattr(dmax_kernels, op)(*arguments, **options)
