"""oput_loss on Triton: float32 throughout; errors that a GPU cannot raise become NaN."""

import pytest
import torch
from cases import stacked_rows
from test_loss import loss_in_float64
from tolerances import LOSS_ATOL, LOSS_RTOL, ROUNDING, assert_close
from triton_device import DEVICE, cpp_op, triton

from dmax_kernels.triton.launch import TILE

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's inf - inf

TRITON_OPTIONS = ({}, {"label_smoothing": 0.1, "z_loss": 0.01, "temperature": 1.7})


def triton_case(vocab_size, dtype, rows=5, target_dtype=torch.int64):
    generator = torch.manual_seed(vocab_size)
    logits = (3 * torch.randn(rows, vocab_size, generator=generator)).to(dtype)
    target = torch.randint(0, vocab_size, (rows,), generator=generator, dtype=target_dtype)
    target[1] = -100
    logits[1] = torch.nan  # an ignored row's logits are not read
    grad = torch.randn(rows, generator=generator)
    grad[-1] = 0
    return logits, target, grad


def loss_and_grad_in_float64(logits, target, grad, options):
    """(loss, gradient of the weighted sum), an ignored row at 0."""
    leaf = logits.double().where(target[:, None] >= 0, 0).requires_grad_()
    loss = loss_in_float64(leaf, target.long(), **options)
    (loss * grad.double()).sum().backward()
    return loss.detach(), leaf.grad


# One tile and two, the second cut
@pytest.mark.parametrize("options", TRITON_OPTIONS, ids=("plain", "smoothed"))
@pytest.mark.parametrize(
    ("vocab_size", "dtype"),
    [
        (1, torch.float32),
        (7, torch.float32),
        (TILE + 801, torch.float32),
        (TILE + 801, torch.bfloat16),
        (127, torch.float16),
    ],
)
def test_triton_loss_and_gradient(vocab_size, dtype, options):
    logits, target, grad = triton_case(vocab_size, dtype)
    expected, expected_grad = loss_and_grad_in_float64(logits, target, grad, options)
    loss, absent, logsumexp, _ = triton.oput_loss(logits, None, target, **options)
    assert absent.shape == (0,)
    assert_close(loss, expected, LOSS_RTOL, 5 * LOSS_ATOL)  # float32 throughout

    # Half a unit in the last place, a whole one where the interpreter truncates to bfloat16
    rounding = 2 * ROUNDING[dtype] if dtype == torch.bfloat16 else max(ROUNDING[dtype], 1e-5)
    atol = 2.0**-24 if dtype == torch.float16 else 1e-7  # float16's smallest step
    backward = triton.oput_loss_backward(grad, logits, target, logsumexp, **options)
    assert_close(backward, expected_grad, rounding, atol)
    assert backward.dtype == dtype

    overwritten = [logits.clone().to(DEVICE) for _ in range(2)]
    losses = triton.oput_loss_and_grad_(*overwritten, target, grad, None, **options)
    assert torch.equal(losses[0], loss)
    assert torch.equal(losses[1], loss)
    assert_close(overwritten[0].cpu(), expected_grad, rounding, atol)
    _, unweighted = loss_and_grad_in_float64(logits, target, torch.ones(len(grad)), options)
    assert_close(overwritten[1].cpu(), unweighted, rounding, atol)


def test_triton_infinite_and_missing_values_as_in_cpp():
    names, logits = stacked_rows(127, torch.float32)
    target = torch.full((len(names),), 5, dtype=torch.int32)
    loss, *_ = triton.oput_loss(logits, logits, target)
    expected, *_ = cpp_op("oput_loss", logits, None, target)
    for name, *both in zip(names, loss.tolist(), expected.tolist(), strict=True):
        assert both[0] == pytest.approx(both[1], rel=2e-6, abs=1e-6, nan_ok=True), name


def test_triton_unknown_target_is_nan_in_its_row_alone():
    logits, target, _ = triton_case(127, torch.float32)
    target[0], target[2] = 127, -1
    for ignore_index in (-100, -1):
        loss, _, logsumexp, _ = triton.oput_loss(logits, None, target, ignore_index=ignore_index)
        bad = [0, 1] if ignore_index == -1 else [0, 2]  # row 1 holds the other index, -100
        assert loss.isnan().nonzero().flatten().tolist() == bad
        options = {"ignore_index": ignore_index}
        grad = triton.oput_loss_backward(torch.ones(5), logits, target, logsumexp, **options)
        assert grad.isnan().all(-1).nonzero().flatten().tolist() == bad
        assert grad.isfinite().all(-1).sum() == 3


def test_triton_gradient_in_place_of_padded_rows():
    logits, target, grad = triton_case(40, torch.float32)
    padded = torch.full((5, 64), 7.0).to(DEVICE)
    padded[:, :40] = logits
    triton.oput_loss_and_grad_(padded[:, :40], None, target, grad)
    _, expected = loss_and_grad_in_float64(logits, target, grad, {})
    assert_close(padded[:, :40].cpu(), expected, 1e-5, 1e-7)
    assert (padded[:, 40:] == 7).all()
    transposed = torch.ones(5, 40).t().contiguous().t()
    with pytest.raises(RuntimeError, match="logits_masked is written in place"):
        triton.oput_loss_and_grad_(transposed, None, target)


@pytest.mark.parametrize("options", TRITON_OPTIONS, ids=("plain", "smoothed"))
def test_triton_common_offset_does_not_cost_precision(options):
    """The statistics stay apart (maximum, log of the sum): their sum would round to 1e-3."""
    logits, target, grad = triton_case(TILE + 801, torch.float32)
    logits += 1e4
    loss, expected_grad = loss_and_grad_in_float64(logits, target, grad, options)
    overwritten = logits.to(DEVICE)
    actual, _ = triton.oput_loss_and_grad_(overwritten, None, target, grad, **options)
    assert_close(actual, loss, LOSS_RTOL, 5 * LOSS_ATOL)
    # A z-loss multiplies by the logsumexp itself, 1e4, which float32 knows to 1e-3
    assert_close(overwritten.cpu(), expected_grad, 1e-5, 1e-7)


def test_triton_empty_inputs():
    empty = torch.ones(0, 9)
    target = torch.ones(0, dtype=torch.int64)
    losses = triton.oput_loss(empty, None, target)
    assert [t.shape for t in losses] == [(0,)] * 4
    assert triton.oput_loss_backward(torch.ones(0), empty, target, losses[2]).shape == (0, 9)
    assert triton.oput_loss_and_grad_(None, empty, target)[1].shape == (0,)


def test_triton_same_row_same_bits():
    logits = 3 * torch.randn(40, 2 * TILE + 801, generator=torch.manual_seed(3))
    target = torch.arange(40) * 7
    loss, *_ = triton.oput_loss(logits, None, target)
    for rows in (slice(7, 8), slice(5, 8), slice(32, 40)):
        assert torch.equal(triton.oput_loss(logits[rows], None, target[rows])[0], loss[rows])
