"""topk_confidence on the CPU."""

import float64
import pytest
import torch
from cases import DTYPES, SMALL_VOCABS, stacked_rows, strided_copies
from tolerances import CONFIDENCE_RTOL, REFERENCE_RTOL, assert_close

import dmax_kernels
from dmax_kernels import reference

OPS = (reference.topk_confidence, dmax_kernels.topk_confidence)


def by_definition(row, k, suppress_token=-1):
    """Ids by (NaN first, value descending, id ascending), sorted in plain Python."""
    values = row.double().tolist()
    if suppress_token >= 0:
        values[suppress_token] = float("-inf")
    order = sorted(
        range(len(values)),
        key=lambda i: (0, 0.0, i) if values[i] != values[i] else (1, -values[i], i),
    )
    return order[:k]


# k = 1 is the top-1, 8 the largest; V = 1 and 7 leave fewer than 8 tokens
@pytest.mark.parametrize("op", OPS, ids=("reference", "cpu"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", SMALL_VOCABS)
@pytest.mark.parametrize("k", [1, 3, 8])
def test_values(op, dtype, vocab_size, k):
    k = min(k, vocab_size)
    names, logits = stacked_rows(vocab_size, dtype)
    tokens, confidences = op(logits, k)
    probability = float64.softmax_of(logits)
    for i, name in enumerate(names):
        assert tokens[i].tolist() == by_definition(logits[i], k), name
    expected = probability.gather(-1, tokens)
    undefined = probability.isnan().any(dim=-1, keepdim=True)
    assert_close(confidences, expected.masked_fill(undefined, torch.nan), REFERENCE_RTOL, 1e-37)


def test_first_is_top1():
    _, logits = stacked_rows(5000, torch.bfloat16)
    token, confidence = dmax_kernels.top1_confidence(logits, temperature=0.7)
    tokens, confidences = dmax_kernels.topk_confidence(logits, 4, temperature=0.7)
    assert torch.equal(tokens[:, 0], token)
    assert torch.equal(confidences[:, 0].nan_to_num(), confidence.nan_to_num())


# A suppressed winner, a suppressed token among the first k, and lists that only it can fill up
@pytest.mark.parametrize("op", OPS, ids=("reference", "cpu"))
@pytest.mark.parametrize(("vocab_size", "k", "suppressed"), [(5000, 8, 3), (9, 8, 2), (4, 4, 0)])
def test_suppressed_token(op, vocab_size, k, suppressed):
    names, logits = stacked_rows(vocab_size, torch.float32)
    tokens, confidences = op(logits, k, suppress_token=suppressed)
    for i, name in enumerate(names):
        assert tokens[i].tolist() == by_definition(logits[i], k, suppressed), name
    assert (confidences[tokens == suppressed].nan_to_num() == 0).all()


@pytest.mark.parametrize("num_rows", [1, 8])
def test_large_vocabulary(num_rows):
    logits = 3 * torch.randn(num_rows, 157184, generator=torch.manual_seed(3))
    tokens, confidences = dmax_kernels.topk_confidence(logits, 8)
    expected_tokens, _ = reference.topk_confidence(logits, 8)
    assert torch.equal(tokens, expected_tokens)
    expected = float64.softmax_of(logits).gather(-1, tokens)
    assert_close(confidences, expected, CONFIDENCE_RTOL)


def test_strides_and_shapes():
    _, logits = stacked_rows(2049, torch.float16)
    expected, _ = dmax_kernels.topk_confidence(logits, 5)
    for name, copy in strided_copies(logits).items():
        assert torch.equal(dmax_kernels.topk_confidence(copy, 5)[0], expected), name
    assert dmax_kernels.topk_confidence(torch.ones(0, 4, 9), 2)[0].shape == (0, 4, 2)
    assert dmax_kernels.topk_confidence(torch.ones(9), 2)[0].tolist() == [0, 1]


@pytest.mark.parametrize("k", [0, 9, -1])
def test_bad_k(k):
    with pytest.raises(RuntimeError, match=rf"^topk_confidence: k must be in 1\.\.8 .*, got {k}"):
        dmax_kernels.topk_confidence(torch.ones(2, 20), k)


def test_bad_input():
    with pytest.raises(RuntimeError, match=r"^topk_confidence: k must be in 1\.\.3 .*, got 4"):
        dmax_kernels.topk_confidence(torch.ones(2, 3), 4)
    with pytest.raises(RuntimeError, match="^topk_confidence: logits must be float32.* got bool"):
        dmax_kernels.topk_confidence(torch.ones(2, 3).bool(), 1)
    with pytest.raises(RuntimeError, match="^topk_confidence: temperature must be"):
        dmax_kernels.topk_confidence(torch.ones(2, 3), 1, temperature=0)
