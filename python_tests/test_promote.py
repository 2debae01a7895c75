"""prefix_promote; CUDA's is in test_simt_embeddings.py."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_device import triton

import dmax_kernels
from dmax_kernels import reference

BACKENDS = {"reference": reference, "cpu": dmax_kernels, "triton": triton}
everywhere = pytest.mark.parametrize("backend", BACKENDS)
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
    backend=st.sampled_from(["reference", "cpu"]),
)
def test_any_block(block, threshold, inclusive, backend):
    confidence = torch.tensor([c for c, _ in block])
    masked = torch.tensor([m for _, m in block], dtype=torch.bool)
    op = BACKENDS[backend].prefix_promote
    promoted = op(confidence, masked, threshold, inclusive=inclusive)
    assert promoted.tolist() == by_definition(
        confidence.tolist(), masked.tolist(), threshold, inclusive
    )


# A warp is 32 positions: one less, one more, several. 1,030: more than one chunk of Triton's
# positions, with the first failure in the first or the second
@everywhere
@pytest.mark.parametrize("inclusive", [False, True])
@pytest.mark.parametrize("block", [1, 31, 32, 33, 64, 256, 1030])
def test_rows_are_independent(backend, block, inclusive):
    generator = torch.manual_seed(block)
    confidence = torch.rand(2, 5, block, generator=generator)
    masked = torch.rand(2, 5, block, generator=generator) < 0.7
    masked[0, 0], masked[0, 1] = True, False
    confidence[0, 0] = 0.9
    confidence[0, 0, block // 2] = NAN
    confidence[0, 2, ::3] = 0.5  # equal to the threshold
    confidence[0, 3] = 0.95
    confidence[0, 3, -1] = 0.1
    op = BACKENDS[backend].prefix_promote
    for threshold in (0.0, 0.5, 1.5):
        promoted = op(confidence, masked, threshold, inclusive=inclusive)
        for *row, actual in zip(
            confidence.view(-1, block).tolist(),
            masked.view(-1, block).tolist(),
            promoted.view(-1, block).tolist(),
            strict=True,
        ):
            assert actual == by_definition(*row, threshold, inclusive)


def test_strides_and_shapes():
    confidence = torch.rand(8, 6).t()
    masked = (torch.rand(6, 16) < 0.5)[:, ::2]
    expected = reference.prefix_promote(confidence, masked, 0.4)
    assert torch.equal(dmax_kernels.prefix_promote(confidence, masked, 0.4), expected)
    for functions in BACKENDS.values():
        for shape in ((0, 5), (5, 0)):
            empty = torch.ones(shape)
            assert functions.prefix_promote(empty, empty.bool(), 0.4).shape == shape


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
