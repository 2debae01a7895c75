"""The Triton losses and gradients against float64; under the interpreter without a GPU."""

import float64
import pytest
import torch
from cases import stacked_rows
from tolerances import LOSS_ATOL, LOSS_RTOL, ROUNDING, assert_close
from triton_device import DEVICE, cpp_op, triton_op

from dmax_kernels.triton import launch

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's inf - inf

WIDE = launch.TILE + 801
IGNORED = -100
OPTIONS = ({}, {"label_smoothing": 0.1, "z_loss": 0.01})


def inputs(vocab_size, dtype, rows=5, target_dtype=torch.int64):
    generator = torch.manual_seed(vocab_size)
    logits = (3 * torch.randn(rows, vocab_size, generator=generator)).to(dtype)
    target = torch.randint(0, vocab_size, (rows,), generator=generator, dtype=target_dtype)
    target[1] = IGNORED
    logits[1] = torch.nan  # an ignored row's logits are not read
    grad = torch.randn(rows, generator=generator)
    grad[-1] = 0
    return logits, target, grad


def in_float64(logits, target, grad, options):
    """(loss, gradient of the weighted sum), an ignored row at 0."""
    keep = target != IGNORED
    leaf = logits.double().where(keep[:, None], 0).requires_grad_()
    loss = float64.token_loss(leaf, target.where(keep, 0).long(), **options) * keep
    (loss * grad.double()).sum().backward()
    return loss.detach(), leaf.grad


# One tile and two, the second cut; both passes at once at one size
@pytest.mark.parametrize("options", OPTIONS, ids=("plain", "smoothed"))
@pytest.mark.parametrize(("vocab_size", "dtype"), [
    (1, torch.float32), (7, torch.float32), (WIDE, torch.float32), (WIDE, torch.bfloat16),
    (127, torch.float16),
])  # fmt: skip
def test_loss_and_gradient(vocab_size, dtype, options):
    logits, target, grad = inputs(vocab_size, dtype)
    expected, expected_grad = in_float64(logits, target, grad, options)
    loss, absent, logsumexp, _ = triton_op("oput_loss", logits, None, target, **options)
    assert absent.shape == (0,)
    assert_close(loss, expected, LOSS_RTOL, 5 * LOSS_ATOL)  # float32 throughout

    # Half a unit in the last place, a whole one where the interpreter cuts bfloat16 off
    rounding = 2 * ROUNDING[dtype] if dtype == torch.bfloat16 else max(ROUNDING[dtype], 1e-5)
    atol = 2.0**-24 if dtype == torch.float16 else 1e-7  # float16's smallest step
    backward = triton_op("oput_loss_backward", grad, logits, target, logsumexp, **options)
    assert_close(backward, expected_grad, rounding, atol)
    assert backward.dtype == dtype

    overwritten = [logits.clone().to(DEVICE) for _ in range(2)]
    losses = triton_op("oput_loss_and_grad_", *overwritten, target, grad, None, **options)
    assert torch.equal(losses[0], loss)
    assert torch.equal(losses[1], loss)
    assert_close(overwritten[0].cpu(), expected_grad, rounding, atol)
    _, unweighted = in_float64(logits, target, torch.ones(len(grad)), options)
    assert_close(overwritten[1].cpu(), unweighted, rounding, atol)


def test_infinite_and_missing_values_as_in_cpp():
    names, logits = stacked_rows(127, torch.float32)
    target = torch.full((len(names),), 5, dtype=torch.int32)
    loss, *_ = triton_op("oput_loss", logits, logits, target)
    expected, *_ = cpp_op("oput_loss", logits, None, target)
    for name, got, wanted in zip(names, loss.tolist(), expected.tolist(), strict=True):
        assert got == pytest.approx(wanted, rel=2e-6, abs=1e-6, nan_ok=True), name


def test_unknown_target_is_nan_in_its_row_alone():
    logits, target, _ = inputs(127, torch.float32)
    target[0], target[2] = 127, -1
    for ignore_index in (IGNORED, -1):
        loss, _, logsumexp, _ = triton_op(
            "oput_loss", logits, None, target, ignore_index=ignore_index
        )
        bad = [0, 1] if ignore_index == -1 else [0, 2]  # row 1 holds the other index, -100
        assert loss.isnan().nonzero().flatten().tolist() == bad
        grad = triton_op(
            "oput_loss_backward", torch.ones(5), logits, target, logsumexp,
            ignore_index=ignore_index,
        )  # fmt: skip
        assert grad.isnan().all(-1).nonzero().flatten().tolist() == bad
        assert grad.isfinite().all(-1).sum() == 3


def test_gradient_in_place_of_padded_rows():
    logits, target, grad = inputs(40, torch.float32)
    padded = torch.full((5, 64), 7.0).to(DEVICE)
    padded[:, :40] = logits
    triton_op("oput_loss_and_grad_", padded[:, :40], None, target, grad)
    _, expected = in_float64(logits, target, grad, {})
    assert_close(padded[:, :40].cpu(), expected, 1e-5, 1e-7)
    assert (padded[:, 40:] == 7).all()
    transposed = torch.ones(5, 40).t().contiguous().t()
    with pytest.raises(RuntimeError, match="logits_masked is written in place"):
        triton_op("oput_loss_and_grad_", transposed, None, target)


@pytest.mark.parametrize("options", OPTIONS, ids=("plain", "smoothed"))
def test_common_offset_does_not_cost_precision(options):
    """The statistics stay apart (maximum, log of the sum): their sum would round to 1e-3."""
    logits, target, grad = inputs(WIDE, torch.float32)
    logits += 1e4
    loss, expected_grad = in_float64(logits, target, grad, options)
    overwritten = logits.to(DEVICE)
    actual, _ = triton_op("oput_loss_and_grad_", overwritten, None, target, grad, **options)
    assert_close(actual, loss, LOSS_RTOL, 5 * LOSS_ATOL)
    # A z-loss multiplies by the logsumexp itself, 1e4, which float32 knows to 1e-3
    assert_close(overwritten.cpu(), expected_grad, 1e-5, 1e-7)


def test_empty_inputs():
    empty = torch.ones(0, 9)
    target = torch.ones(0, dtype=torch.int64)
    losses = triton_op("oput_loss", empty, None, target)
    assert [t.shape for t in losses] == [(0,)] * 4
    assert triton_op("oput_loss_backward", torch.ones(0), empty, target, losses[2]).shape == (0, 9)
    assert triton_op("oput_loss_and_grad_", None, empty, target)[1].shape == (0,)
