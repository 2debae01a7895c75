"""top1_partial and top1_merge on the CPU: sharded equals unsharded."""

import float64
import pytest
import torch
from cases import DTYPES, stacked_rows
from tolerances import CONFIDENCE_RTOL, REFERENCE_RTOL, assert_close

import dmax_kernels
from dmax_kernels import reference

BACKENDS = ((reference, REFERENCE_RTOL), (dmax_kernels, 2 * CONFIDENCE_RTOL))
WIDTHS = ([5000], [2500, 2500], [1, 2047, 2049, 903], [4998, 1, 1])


def sharded_top1(backend, logits, widths, **options):
    """As tensor-parallel ranks would: each its columns, then the merge."""
    starts = [sum(widths[:i]) for i in range(len(widths))]
    parts = [
        backend.top1_partial(shard, start, **options)
        for shard, start in zip(logits.split(widths, dim=-1), starts, strict=True)
    ]
    stacked = (torch.stack(column) for column in zip(*parts, strict=True))
    return backend.top1_merge(*stacked, temperature=options.get("temperature", 1.0))


# One shard, even shards, uneven shards, shards of one token; every edge case, in every dtype
@pytest.mark.parametrize(("backend", "rtol"), BACKENDS, ids=("reference", "cpu"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "widths", [[5000], [2500, 2500], [1, 2047, 2049, 903], [4998, 1, 1]], ids=str
)
def test_sharded_equals_unsharded(backend, rtol, dtype, widths):
    names, logits = stacked_rows(5000, dtype)
    token, confidence = sharded_top1(backend, logits, widths)
    expected_token, expected = float64.top1_confidence(logits)
    for i, name in enumerate(names):
        assert token[i] == expected_token[i], name
    assert_close(confidence, expected, rtol)


@pytest.mark.parametrize(("backend", "rtol"), BACKENDS, ids=("reference", "cpu"))
@pytest.mark.parametrize("suppress_token", [0, 3, 2500, 4999])
def test_temperature_and_suppressed_token(backend, rtol, suppress_token):
    _, logits = stacked_rows(5000, torch.float32)
    options = {"temperature": 0.6, "suppress_token": suppress_token}
    token, confidence = sharded_top1(backend, logits, [1200, 1300, 2500], **options)
    expected_token, expected = float64.top1_confidence(logits, **options)
    assert torch.equal(token, expected_token)
    assert_close(confidence, expected, rtol)


@pytest.mark.parametrize(("backend", "rtol"), BACKENDS, ids=("reference", "cpu"))
def test_maxima_that_round_to_one_quotient(backend, rtol):
    """Divided by 3 the two best logits are equal in float32; the larger one wins all the same."""
    low, high = 1.5 + 2**-23, 1.5 + 2**-22
    assert torch.tensor(low) / 3 == torch.tensor(high) / 3
    logits = torch.tensor([[0.0, low, 0.0, high]])
    token, confidence = sharded_top1(backend, logits, [2, 2], temperature=3.0)
    assert token.item() == 3
    assert_close(confidence, float64.top1_confidence(logits, 3.0)[1], rtol)


@pytest.mark.parametrize(("backend", "rtol"), BACKENDS, ids=("reference", "cpu"))
def test_empty_shard_is_exact(backend, rtol):
    """Padded columns past the vocabulary, all -inf, have no mass and can not win."""
    logits = torch.randn(6, 40)
    padded = torch.cat([logits, torch.full((6, 24), -torch.inf)], dim=1)
    maximum, sum_exp, token = backend.top1_partial(padded[:, 40:], 40)
    assert (maximum == -torch.inf).all()
    assert (sum_exp == 0).all()
    assert (token == 40).all()
    token, confidence = sharded_top1(backend, padded, [40, 24])
    assert torch.equal(token, logits.argmax(-1))
    assert_close(confidence, float64.top1_confidence(logits)[1], rtol)


def test_ids_beyond_float32():
    """Ids near 2^40 survive: they travel as integers."""
    start = 2**40 + 1
    *_, token = dmax_kernels.top1_partial(torch.tensor([[0.0, 1.0]]), start)
    assert token.item() == start + 1
    merged, _ = dmax_kernels.top1_merge(torch.ones(1, 1), torch.ones(1, 1), token.unsqueeze(0))
    assert merged.item() == start + 1


def test_shapes():
    partial = dmax_kernels.top1_partial(torch.randn(2, 3, 7), 0)
    assert all(t.shape == (2, 3) for t in partial)
    assert dmax_kernels.top1_partial(torch.randn(0, 7), 0)[0].shape == (0,)
    token, confidence = dmax_kernels.top1_merge(*(torch.stack([t, t]) for t in partial))
    assert token.shape == confidence.shape == (2, 3)
    transposed = (t.expand(2, 2, 3).transpose(1, 2) for t in partial)
    assert dmax_kernels.top1_merge(*transposed)[0].shape == (3, 2)


F32, I64 = torch.ones(2, 3), torch.ones(2, 3).long()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda k: k.top1_partial(torch.ones(2, 3), -1), "top1_partial: vocab_start must be .* -1"),
        (lambda k: k.top1_partial(I64, 0), "top1_partial: logits_shard must be float32.*int64"),
        (
            lambda k: k.top1_partial(F32, 0, suppress_token=-2),
            r"top1_partial: suppress_token must be -1 \(none\) .*, got -2",
        ),
        (lambda k: k.top1_partial(F32, 0, temperature=0), "top1_partial: temperature must be"),
        (lambda k: k.top1_merge(F32, F32, F32), "top1_merge: token must be int64, got float32"),
        (
            lambda k: k.top1_merge(F32, F32, I64, temperature=0),
            "top1_merge: temperature must be at least 1e-30",
        ),
        (lambda k: k.top1_merge(F32.half(), F32, I64), "top1_merge: maximum must be float32"),
        (
            lambda k: k.top1_merge(F32, F32[:, :2], I64),
            r"top1_merge: sum_exp must have shape",
        ),
        (lambda k: k.top1_merge(F32[:0], F32[:0], I64[:0]), r"top1_merge: maximum must be \[S, "),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(RuntimeError, match="^" + message):
        call(dmax_kernels)
