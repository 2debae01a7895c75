"""prefix_promote on the CPU."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dmax_kernels
from dmax_kernels import reference

OPS = (reference.prefix_promote, dmax_kernels.prefix_promote)
NAN = float("nan")


def by_definition(confidence, masked, threshold, inclusive):
    """Algorithm 1, lines 5-8, in plain Python."""
    positions = [j for j, is_masked in enumerate(masked) if is_masked]
    prefix = []
    for j in positions:
        if not (confidence[j] >= threshold if inclusive else confidence[j] > threshold):
            break
        prefix.append(j)
    prefix = prefix or positions[:1]
    return [j in prefix for j in range(len(masked))]


# Few distinct confidences, so that equality with the threshold and NaN are common
@settings(max_examples=300, deadline=None)
@given(
    block=st.lists(
        st.tuples(st.sampled_from([0.0, 0.3, 0.5, 0.7, 1.0, NAN]), st.booleans()), max_size=70
    ),
    threshold=st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0]),
    inclusive=st.booleans(),
    op=st.sampled_from(OPS),
)
def test_any_block(block, threshold, inclusive, op):
    confidence = torch.tensor([c for c, _ in block])
    masked = torch.tensor([m for _, m in block], dtype=torch.bool)
    promoted = op(confidence, masked, threshold, inclusive=inclusive)
    assert promoted.tolist() == by_definition(
        confidence.tolist(), masked.tolist(), threshold, inclusive
    )


# A warp is 32 positions: one less, one more, several, a part
@pytest.mark.parametrize("op", OPS, ids=("reference", "cpu"))
@pytest.mark.parametrize("block", [1, 31, 32, 33, 64, 256])
def test_rows_are_independent(op, block):
    generator = torch.manual_seed(block)
    confidence = torch.rand(3, 40, block, generator=generator)
    masked = torch.rand(3, 40, block, generator=generator) < 0.6
    masked[0, 0] = False
    masked[0, 1] = True
    promoted = op(confidence, masked, 0.3)
    for i in range(3):
        for j in range(40):
            expected = by_definition(confidence[i, j].tolist(), masked[i, j].tolist(), 0.3, False)
            assert promoted[i, j].tolist() == expected


def test_strides_and_shapes():
    confidence = torch.rand(8, 6).t()
    masked = (torch.rand(6, 16) < 0.5)[:, ::2]
    expected = reference.prefix_promote(confidence, masked, 0.4)
    assert torch.equal(dmax_kernels.prefix_promote(confidence, masked, 0.4), expected)
    assert dmax_kernels.prefix_promote(torch.ones(0, 5), torch.ones(0, 5).bool(), 0.4).shape == (
        0,
        5,
    )
    assert dmax_kernels.prefix_promote(torch.ones(5, 0), torch.ones(5, 0).bool(), 0.4).shape == (
        5,
        0,
    )


@pytest.mark.parametrize(
    ("confidence", "masked", "threshold", "message"),
    [
        (
            torch.ones(3).half(),
            torch.ones(3).bool(),
            0.5,
            "confidence must be float32, got",
        ),
        (torch.ones(3), torch.ones(3), 0.5, "masked must be bool, got float32"),
        (torch.ones(3), torch.ones(4).bool(), 0.5, r"masked must have shape \[3\] .*, got \[4\]"),
        (torch.tensor(1.0), torch.tensor(True), 0.5, r"confidence must be \[..., K\], got a 0-D"),
        (torch.ones(3), torch.ones(3).bool(), NAN, "threshold must be a number, got NaN"),
    ],
)
def test_bad_input(confidence, masked, threshold, message):
    with pytest.raises(RuntimeError, match="^prefix_promote: " + message):
        dmax_kernels.prefix_promote(confidence, masked, threshold)
