"""top1_confidence on the CPU: the reference against float64, the kernel against the reference."""

import float64
import pytest
import torch
from cases import (
    DTYPES,
    LARGE_VOCABS,
    SMALL_VOCABS,
    stacked_rows,
    strided_copies,
)
from tolerances import CONFIDENCE_RTOL, REFERENCE_RTOL, assert_close

import dmax_kernels
from dmax_kernels import reference

# (op, relative tolerance of its confidence)
OPS = (
    (reference.top1_confidence, REFERENCE_RTOL),
    (dmax_kernels.top1_confidence, CONFIDENCE_RTOL),
)


# Every edge case in every dtype at every small V: tails, tiles, ties at each level of the reduction
@pytest.mark.parametrize(("op", "rtol"), OPS, ids=("reference", "cpu"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", SMALL_VOCABS)
def test_values(op, rtol, dtype, vocab_size):
    names, logits = stacked_rows(vocab_size, dtype)
    token, confidence = op(logits)
    expected_token, expected_confidence = float64.top1_confidence(logits)
    wrong = [
        n for n, same in zip(names, (token == expected_token).tolist(), strict=True) if not same
    ]
    assert not wrong
    assert token.dtype == torch.int64
    assert confidence.dtype == torch.float32
    assert_close(confidence, expected_confidence, rtol)


# The real vocabulary, aligned and odd; three rows take the tiled path, eight the row path
@pytest.mark.parametrize("num_rows", [1, 3, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", LARGE_VOCABS)
def test_large_vocabulary(num_rows, dtype, vocab_size):
    logits = (3 * torch.randn(num_rows, vocab_size, generator=torch.manual_seed(1))).to(dtype)
    token, confidence = dmax_kernels.top1_confidence(logits)
    probability = float64.softmax_of(logits)
    best = probability.amax(dim=-1)
    assert torch.equal(token, logits.float().argmax(dim=-1))
    assert_close(confidence, best, rtol=CONFIDENCE_RTOL)


@pytest.mark.parametrize(("op", "rtol"), OPS, ids=("reference", "cpu"))
@pytest.mark.parametrize("temperature", [1e-30, 1e-3, 0.7, 5.0, 1e6])
def test_temperature(op, rtol, temperature):
    names, logits = stacked_rows(5000, torch.float32)
    token, confidence = op(logits, temperature=temperature)
    expected_token, expected = float64.top1_confidence(logits, temperature)
    assert torch.equal(token, expected_token)
    if temperature >= 1e-3:  # below, float64 itself only knows one winner
        assert_close(confidence, expected, rtol)
    else:
        ties = {"flat", "tie_of_neighbours", "tie_across_vectors", "tie_across_tiles"}
        winners = {"normal", "peaked", "large_offset"}
        by_name = dict(zip(names, confidence.tolist(), strict=True))
        assert all(by_name[name] == 1.0 for name in winners)
        assert all(by_name[name] <= 0.5 for name in ties)


# First, last, the winner itself, one inside a vector, one at a tile's edge
@pytest.mark.parametrize(("op", "rtol"), OPS, ids=("reference", "cpu"))
@pytest.mark.parametrize("suppress_token", [0, 3, 6, 2047, 2048, 4999])
def test_suppressed_token(op, rtol, suppress_token):
    _, logits = stacked_rows(5000, torch.float32)
    token, confidence = op(logits, suppress_token=suppress_token)
    expected_token, expected = float64.top1_confidence(logits, suppress_token=suppress_token)
    assert torch.equal(token, expected_token)
    assert_close(confidence, expected, rtol)


def test_only_token_suppressed():
    token, confidence = dmax_kernels.top1_confidence(torch.ones(2, 1), suppress_token=0)
    assert token.tolist() == [0, 0]
    assert confidence.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(dtype):
    _, logits = stacked_rows(2049, dtype)
    expected_token, expected = dmax_kernels.top1_confidence(logits)
    for name, copy in strided_copies(logits).items():
        token, confidence = dmax_kernels.top1_confidence(copy)
        assert torch.equal(token, expected_token), name
        assert torch.equal(confidence.nan_to_num(), expected.nan_to_num()), name


def test_leading_shapes():
    logits = torch.randn(2, 3, 4, 50)
    token, confidence = dmax_kernels.top1_confidence(logits)
    assert token.shape == confidence.shape == (2, 3, 4)
    assert dmax_kernels.top1_confidence(logits[0, 0, 0])[0].shape == ()
    assert dmax_kernels.top1_confidence(logits[:0])[0].shape == (0, 3, 4)
    expanded = logits[:1].expand(5, 3, 4, 50)  # stride 0
    assert torch.equal(dmax_kernels.top1_confidence(expanded)[0], token[:1].expand(5, 3, 4))
    shuffled = logits.permute(2, 0, 1, 3)  # rows at no common stride
    assert torch.equal(dmax_kernels.top1_confidence(shuffled)[0], token.permute(2, 0, 1))


# The promise of batch invariance: alone, among 3 (tiled path) and among 64 (row path), on any
# number of threads
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_row_same_bits(dtype):
    logits = (3 * torch.randn(64, 157184, generator=torch.manual_seed(2))).to(dtype)
    token, confidence = dmax_kernels.top1_confidence(logits)
    threads = torch.get_num_threads()
    try:
        for num_threads in (1, 2, 5):
            torch.set_num_threads(num_threads)
            for rows in (slice(7, 8), slice(5, 8), slice(0, 64)):
                some_token, some_confidence = dmax_kernels.top1_confidence(logits[rows])
                assert torch.equal(some_token, token[rows])
                assert torch.equal(some_confidence, confidence[rows])
    finally:
        torch.set_num_threads(threads)


def test_more_than_2_to_31_elements():
    """Row offsets are 64-bit: 2,200 rows at a stride of 1,000,001 elements, of a small buffer."""
    rows, stride, vocab_size = 2200, 1_000_001, 64
    try:
        buffer = torch.empty(rows * stride, dtype=torch.bfloat16)  # untouched pages cost nothing
    except RuntimeError:
        pytest.skip("no address space for a 4.4 GB buffer")
    logits = buffer.as_strided((rows, vocab_size), (stride, 1))
    logits.copy_(torch.randn(rows, vocab_size))
    token, _ = dmax_kernels.top1_confidence(logits)
    assert torch.equal(token, logits.float().argmax(dim=-1))


def test_no_gradient_is_an_error():
    logits = torch.randn(3, 8, requires_grad=True)
    _, confidence = dmax_kernels.top1_confidence(logits)
    with pytest.raises(RuntimeError, match=r"top1_confidence: has no gradient; detach the logits"):
        confidence.sum().backward()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.tensor(1.0), {}), r"logits must be \[..., V\], got a 0-D tensor"),
        ((torch.ones(2, 0), {}), r"logits must be \[..., V\] with V >= 1, got \[2, 0\]"),
        (
            (torch.ones(2, 3).double(), {}),
            "logits must be float32.*float16, got float64",
        ),
        ((torch.ones(2, 3).long(), {}), "logits must be float32, bfloat16 or float16, got int64"),
        ((torch.ones(2, 3), {"temperature": 0.0}), "temperature must be at least 1e-30 .*, got 0"),
        (
            (torch.ones(2, 3), {"temperature": -1.0}),
            "temperature must be at least 1e-30.*, got -1",
        ),
        ((torch.ones(2, 3), {"temperature": float("nan")}), "temperature must be .*, got nan"),
        ((torch.ones(2, 3), {"suppress_token": 3}), "suppress_token must be -1 .* below 3, got 3"),
        ((torch.ones(2, 3), {"suppress_token": -2}), "suppress_token must be -1 .*, got -2"),
    ],
)
def test_bad_input(arguments, message):
    logits, options = arguments
    with pytest.raises(RuntimeError, match="^top1_confidence: " + message):
        dmax_kernels.top1_confidence(logits, **options)
