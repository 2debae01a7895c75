"""sample_partial and sample_merge on the CPU: however the vocabulary is cut, one sample."""

import pytest
import torch
from cases import DTYPES, stacked_rows
from tolerances import CONFIDENCE_RTOL, REFERENCE_RTOL, assert_close

import dmax_kernels
from dmax_kernels import reference

BACKENDS = ((reference, REFERENCE_RTOL), (dmax_kernels, 2 * CONFIDENCE_RTOL))
SEED = torch.tensor([1234567890123456789, 42])


def partials(backend, logits, seed, widths, **options):
    starts = [sum(widths[:i]) for i in range(len(widths))]
    parts = [
        backend.sample_partial(shard, seed, start, **options)
        for shard, start in zip(logits.split(widths, dim=-1), starts, strict=True)
    ]
    return [torch.stack(column) for column in zip(*parts, strict=True)]


def sharded_sample(backend, logits, seed, widths, **options):
    temperature = options.get("temperature", 1.0)
    parts = partials(backend, logits, seed, widths, **options)
    return backend.sample_merge(*parts, temperature=temperature)


# One shard, even ones, starts that leave every remainder of 4 (four ids share a counter) and of 64
# (a chunk of the CPU kernel), shards of one token; every edge case, in every dtype
@pytest.mark.parametrize(("backend", "rtol"), BACKENDS, ids=("reference", "cpu"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "widths", [[5000], [2500, 2500], [1, 2049, 1, 904, 2045], [4998, 1, 1]], ids=str
)
def test_sharded_equals_unsharded(backend, rtol, dtype, widths):
    names, logits = stacked_rows(5000, dtype)
    for options in ({}, {"temperature": 0.3, "suppress_token": 2050}):
        token, probability = sharded_sample(backend, logits, SEED, widths, **options)
        expected, expected_probability = backend.sample_tokens(logits, SEED, **options)
        assert not [names[i] for i in (token != expected).nonzero()[:, 0]]
        assert_close(probability, expected_probability, rtol, atol=1e-37)


def test_many_draws():
    """5,000 rows of flat logits, where every id can win; the same at a seed per row."""
    logits = torch.randn(5000, 130, generator=torch.manual_seed(1))
    per_row = torch.stack([torch.arange(5000) * 2**40, -torch.arange(5000)], dim=1)
    for seed in (SEED, per_row):
        expected, _ = dmax_kernels.sample_tokens(logits, seed)
        token, _ = sharded_sample(dmax_kernels, logits, seed, [33, 34, 63])
        assert torch.equal(token, expected)
        assert token.unique().numel() > 100


def test_ids_far_up():
    """The noise is that of the id in the whole vocabulary, up to the last one."""
    logits, start = torch.zeros(3, 10), 2**31 - 10
    *_, token, score, _ = dmax_kernels.sample_partial(logits, SEED, start)
    *_, expected, expected_score, _ = reference.sample_partial(logits, SEED, start)
    assert torch.equal(token, expected)
    assert_close(score, expected_score, 1e-5)
    assert (token >= start).all()


def test_shard_without_mass():
    logits = torch.randn(6, 40)
    padded = torch.cat([logits, torch.full((6, 24), -torch.inf)], dim=1)
    for backend, _ in BACKENDS:
        maximum, sum_exp, token, score, weight = backend.sample_partial(padded[:, 40:], SEED, 40)
        assert (maximum == -torch.inf).all()
        assert (score == -torch.inf).all()
        assert (sum_exp == 0).all()
        assert (weight == 0).all()
        assert (token == 40).all()
        token, _ = sharded_sample(backend, padded, SEED, [40, 24])
        assert torch.equal(token, backend.sample_tokens(logits, SEED)[0])


def test_shapes():
    parts = dmax_kernels.sample_partial(torch.randn(2, 3, 7), SEED, 5)
    assert all(t.shape == (2, 3) for t in parts)
    token, probability = dmax_kernels.sample_merge(*(torch.stack([t, t]) for t in parts))
    assert token.shape == probability.shape == (2, 3)
    assert dmax_kernels.sample_partial(torch.randn(0, 7), SEED, 0)[0].shape == (0,)


F32, I64 = torch.ones(2, 3), torch.ones(2, 3).long()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda k: k.sample_partial(F32, SEED, -1), "sample_partial: vocab_start must be .* -1"),
        (
            lambda k: k.sample_partial(F32, SEED, 2**31 - 2),
            "sample_partial: token ids must be below 2147483648, got a shard of 3 from 2147483646",
        ),
        (lambda k: k.sample_partial(I64, SEED, 0), "sample_partial: logits_shard must be float32"),
        (lambda k: k.sample_partial(F32, F32, 0), "sample_partial: seed must be int64"),
        (
            lambda k: k.sample_partial(F32, SEED, 0, temperature=0),
            "sample_partial: temperature must be at least 1e-30",
        ),
        (
            lambda k: k.sample_merge(F32, F32, I64, F32[:1], F32),
            r"sample_merge: score must have shape \[2, 3\]",
        ),
        (lambda k: k.sample_merge(F32, F32, F32, F32, F32), "sample_merge: token must be int64"),
        (lambda k: k.sample_merge(F32, F32, I64, F32, I64), "sample_merge: weight must be float32"),
        (
            lambda k: k.sample_merge(F32[:0], F32[:0], I64[:0], F32[:0], F32[:0]),
            r"sample_merge: maximum must be \[S, ",
        ),
        (
            lambda k: k.sample_merge(F32, F32, I64, F32, F32, temperature=-1.0),
            "sample_merge: temperature must be at least 1e-30",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(RuntimeError, match="^" + message):
        call(dmax_kernels)
