"""sample_tokens on the CPU: the generator, the distribution, the edges."""

import math

import float64
import pytest
import torch
from cases import DTYPES, SMALL_VOCABS, stacked_rows, strided_copies
from tolerances import REFERENCE_RTOL, assert_close

import dmax_kernels
from dmax_kernels import reference
from dmax_kernels.reference.sample import exponential_noise, philox4x32

OPS = (reference.sample_tokens, dmax_kernels.sample_tokens)
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


def assert_same_samples(logits, seed, **options):
    """Equal to the reference, but where its two best scores lie within rounding of each other."""
    token, probability = dmax_kernels.sample_tokens(logits, seed, **options)
    expected, expected_probability = reference.sample_tokens(logits, seed, **options)
    x = logits.float() / options.get("temperature", 1.0)
    score = x - exponential_noise(seed, logits.shape[:-1], logits.shape[-1]).log()
    gap = score.gather(-1, expected.unsqueeze(-1)) - score.gather(-1, token.unsqueeze(-1))
    differs = token != expected
    assert (gap.squeeze(-1)[differs].abs() <= 1e-5).all()
    assert differs.sum() <= 0.001 * max(differs.numel(), 1000)
    assert_close(probability[~differs], expected_probability[~differs], REFERENCE_RTOL, atol=1e-37)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", SMALL_VOCABS)
def test_edge_cases(dtype, vocab_size):
    _, logits = stacked_rows(vocab_size, dtype)
    assert_same_samples(logits, SEED)
    assert_same_samples(logits, SEED, temperature=0.3)


@pytest.mark.parametrize("num_rows", [1, 8])
def test_large_vocabulary(num_rows):
    logits = 2 * torch.randn(num_rows, 157184, generator=torch.manual_seed(4))
    assert_same_samples(logits, SEED)
    assert_same_samples(logits, SEED, temperature=1.7, suppress_token=156895)


@pytest.mark.parametrize("op", OPS, ids=("reference", "cpu"))
def test_undefined_rows(op):
    names, logits = stacked_rows(5000, torch.float32)
    token, probability = op(logits, SEED)
    expected, _ = float64.top1_confidence(logits)
    for i, name in enumerate(names):
        if "nan" in name or name in ("inf", "infs", "all_minus_inf"):
            assert token[i] == expected[i], name
            assert probability[i].isnan(), name
        else:
            assert logits[i, token[i]] > -torch.inf, name
            assert probability[i] > 0, name


# 40 tokens, one of them without mass; G-test at 39 - 1 degrees of freedom, 200,000 draws. The
# seeds are fixed, so the test either always passes or always fails.
@pytest.mark.parametrize("op", OPS, ids=("reference", "cpu"))
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_distribution(op, temperature):
    draws = 200_000
    logits = torch.randn(40, generator=torch.manual_seed(5))
    logits[17] = -torch.inf
    token, _ = op(logits.expand(draws, 40), torch.tensor([99, 0]), temperature=temperature)
    counts = torch.bincount(token, minlength=40).double()
    expected = draws * float64.softmax_of(logits, temperature)
    assert counts[17] == 0
    seen = counts > 0
    g = 2 * (counts[seen] * (counts[seen] / expected[seen]).log()).sum().item()
    # 38 degrees of freedom: mean 38, standard deviation 8.7
    assert 38 - 4 * math.sqrt(76) < g < 38 + 5 * math.sqrt(76)


def test_rare_tokens_are_sampled_in_proportion():
    """Large vocabulary, one token with half of the mass: noise of 24 bits would tie in the tail."""
    draws, vocab_size = 4000, 20000
    logits = torch.zeros(vocab_size)
    logits[123] = math.log(vocab_size - 1)
    token, _ = dmax_kernels.sample_tokens(logits.expand(draws, vocab_size), torch.tensor([7, 7]))
    share = (token == 123).double().mean().item()
    assert abs(share - 0.5) < 5 * 0.5 / math.sqrt(draws)
    rest = token[token != 123].double()
    assert abs(rest.mean().item() / vocab_size - 0.5) < 5 * 0.29 / math.sqrt(len(rest))


def test_greedy_is_top1():
    _, logits = stacked_rows(5000, torch.bfloat16)
    token, probability = dmax_kernels.sample_tokens(logits, SEED, temperature=0, suppress_token=3)
    expected, confidence = dmax_kernels.top1_confidence(logits, suppress_token=3)
    assert torch.equal(token, expected)
    assert torch.equal(probability.nan_to_num(), confidence.nan_to_num())


def test_tiny_temperature_is_greedy():
    logits = torch.randn(50, 300, generator=torch.manual_seed(9))
    token, probability = dmax_kernels.sample_tokens(logits, SEED, temperature=1e-20)
    assert torch.equal(token, logits.argmax(-1))
    assert (probability == 1).all()


def test_seed_per_row_does_not_depend_on_the_batch():
    logits = torch.randn(6, 500, generator=torch.manual_seed(10))
    seeds = torch.stack([torch.arange(6) + 100, torch.arange(6) * 2**33], dim=1)
    token, _ = dmax_kernels.sample_tokens(logits, seeds)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    assert torch.equal(dmax_kernels.sample_tokens(logits[order], seeds[order])[0], token[order])
    for i in range(6):
        assert dmax_kernels.sample_tokens(logits[i : i + 1], seeds[i : i + 1])[0] == token[i]
        assert reference.sample_tokens(logits[i : i + 1], seeds[i : i + 1])[0] == token[i]


def test_every_part_of_the_key_matters():
    logits = torch.zeros(64, 1000)
    draws = [
        dmax_kernels.sample_tokens(logits, torch.tensor(seed))[0]
        for seed in ([1, 0], [2, 0], [1 + 2**32, 0], [1, 1], [1, 2**32], [-1, -1])
    ]
    for i, first in enumerate(draws):
        assert first.unique().numel() > 50  # the row matters, too
        for second in draws[:i]:
            assert (first == second).sum() < 5
    assert torch.equal(dmax_kernels.sample_tokens(logits, torch.tensor([1, 0]))[0], draws[0])


def test_strides_threads_and_shapes():
    _, logits = stacked_rows(2049, torch.float32)
    expected, _ = dmax_kernels.sample_tokens(logits, SEED)
    for name, copy in strided_copies(logits).items():
        assert torch.equal(dmax_kernels.sample_tokens(copy, SEED)[0], expected), name
    assert dmax_kernels.sample_tokens(torch.ones(0, 3, 9), SEED)[0].shape == (0, 3)
    assert dmax_kernels.sample_tokens(torch.ones(9), SEED)[0].shape == ()


@pytest.mark.parametrize(
    ("logits", "seed", "options", "message"),
    [
        (torch.ones(2, 9), torch.ones(2), {}, "seed must be int64, got float32"),
        (torch.ones(2, 9), torch.ones(3).long(), {}, r"seed must have shape \[2\] .*, got \[3\]"),
        (
            torch.ones(2, 9),
            torch.ones(3, 2).long(),
            {},
            r"seed must have shape \[2, 2\]",
        ),
        (torch.ones(2, 9), SEED, {"temperature": -1.0}, "temperature must be at least 1e-30"),
        (torch.ones(2, 9), SEED, {"suppress_token": 9}, "suppress_token must be -1 .*, got 9"),
        (torch.ones(2, 9).int(), SEED, {}, "logits must be float32.*, got int32"),
    ],
)
def test_bad_input(logits, seed, options, message):
    with pytest.raises(RuntimeError, match="^sample_tokens: " + message):
        dmax_kernels.sample_tokens(logits, seed, **options)
