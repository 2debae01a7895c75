"""linear_oput_loss_sum: the reduced loss with its gradients, in three products rather than four."""

import contextlib
import functools

import pytest
import torch
from linear_losses import BACKENDS, NARROW, OPTIONS, case, dmax_calls, in_float64
from tolerances import ROUNDING, assert_close
from triton_device import DEVICE

import dmax_kernels
from dmax_kernels.triton import IMPLEMENTATIONS

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's inf - inf


def run_sum(backend, hidden, weight, bias, target, factors, **options):
    """(total, its part of each pass, logsumexps of both passes, gradients of both hiddens, weight
    and bias)."""
    return BACKENDS[backend](
        "linear_oput_loss_sum", *hidden, weight, target, bias, *factors, **options
    )


@contextlib.contextmanager
def few_rows_kept(vocab_size):
    """Triton keeps the logits of two rows, so that those of the others are computed again."""
    from dmax_kernels.triton import linear_gradients

    before = linear_gradients.KEPT_BYTES
    linear_gradients.KEPT_BYTES = 2 * 4 * vocab_size
    try:
        yield
    finally:
        linear_gradients.KEPT_BYTES = before


# On the CPU 16 MiB of logits are kept, 64 rows of (75, 65000, 8). In float32 that takes sweeps of
# 44, 44 and 42 rows for both passes, and of 33 and 32 for one; with 16 bits, the logits of 66 rows
# or of one are computed again. Where bfloat16 is multiplied directly, the
# logits of up to D / 2 rows lie in the weight's gradient, as in (10, 900, 64)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("backend", "shape", "keep"),
    [
        ("cpu", (1, 1, 1), contextlib.nullcontext),
        ("cpu", (37, 4300, 24), contextlib.nullcontext),
        ("cpu", (75, 65000, 8), contextlib.nullcontext),
        ("cpu", (10, 900, 64), contextlib.nullcontext),
        ("triton", (4, 300, 40), contextlib.nullcontext),
        ("triton", (4, 140, 33), functools.partial(few_rows_kept, 140)),
    ],
    ids=["cpu-one", "cpu", "cpu-sweeps", "cpu-inside", "triton", "triton-few-kept"],
)
def test_sum_with_its_gradients(backend, shape, keep, dtype):
    """Three products: the gradients of sum_i factor_i loss_i come with it."""
    check_sum(backend, shape, keep, dtype)


def test_sum_of_more_rows_than_the_gradient_has_room_for():
    """Of 70 rows the logits of 60 lie in the weight's gradient, where bfloat16 is multiplied
    directly; those of the others are computed again."""
    check_sum("cpu", (40, 70001, 120), contextlib.nullcontext, torch.bfloat16)


def check_sum(backend, shape, keep, dtype):
    if backend == "triton" and dtype not in (torch.float32, NARROW):
        pytest.skip("the interpreter multiplies the bits of bfloat16")
    hidden, weight, bias, target = case(*shape, dtype)
    factors = torch.randn(2, len(target), generator=torch.manual_seed(2))
    for *passes, own_bias, options in (
        (*hidden, bias, OPTIONS[1]),
        (None, hidden[1], None, {}),
    ):
        losses, expected = in_float64(passes, weight, own_bias, target, factors, options)
        by_pass = torch.tensor([0.0 if loss is None else (f * loss).sum()
                                for f, loss in zip(factors, losses, strict=True)])  # fmt: skip
        given = [None if h is None else f for h, f in zip(passes, factors, strict=True)]
        with keep():
            (total, parts, *_), *grads = split(
                run_sum(backend, passes, weight, own_bias, target, given, **options)
            )
        assert total.shape == ()
        assert_close(total, by_pass.sum(), 1e-5, 1e-5 * len(target))
        assert_close(parts, by_pass, 1e-5, 1e-5 * len(target))
        wide = dtype == torch.float32 or (backend == "cpu" and dtype == torch.float16)
        for gradient, right in zip(*grads, expected, strict=True):
            if right is None:
                assert gradient.shape == (0,)
                continue
            # A float32 sum that holds the target's term takes one after the other of V small ones
            share = max(3e-6, 1e-9 * shape[1]) if wide else ROUNDING[dtype]
            assert gradient.dtype == dtype
            assert_close(gradient, right, ROUNDING[dtype], share * right.abs().max().item())
        again = run_sum(backend, passes, weight, own_bias, target, given, **options)
        with keep():
            first = run_sum(backend, passes, weight, own_bias, target, given, **options)
            second = run_sum(backend, passes, weight, own_bias, target, given, **options)
        assert all(map(torch.equal, first, second))
        assert [t.shape for t in again] == [t.shape for t in first]


def split(results):
    """The sums and the logsumexps, then the gradients."""
    return results[:4], results[4:]


def test_when_there_are_three_products():
    """Reductions make the gradients at once, where no one needs a gradient of a single loss."""
    hidden, weight, _, target = case(6, 90, 12)

    def ops_of(*, backward=True, dtype=torch.float32, needs=True, **options):
        leaves = [t.to(dtype).requires_grad_(needs) for t in (*hidden, weight)]
        with dmax_calls() as names:
            loss = dmax_kernels.linear_oput_loss(*leaves, target, **options)
            if backward:
                loss.backward()
        return names

    at_once = ["linear_oput_loss_sum", "linear_oput_loss_scale_"]
    later = ["linear_oput_loss", "linear_oput_loss_backward"]
    learnt = torch.ones(6, requires_grad=True)
    for reduction in ("sum", "mean"):
        assert set(ops_of(reduction=reduction)) == set(at_once)
        assert ops_of(reduction=reduction, token_weight=learnt) == later
        # A loss scale comes too late for these: it keeps their gradients from underflowing
        assert ops_of(reduction=reduction, dtype=torch.float16) == later
        assert ops_of(reduction=reduction, needs=False, backward=False) == later[:1]
    assert ops_of(backward=False) == later[:1]


@pytest.mark.parametrize("needs", [True, False], ids=["three products", "single losses"])
def test_what_each_pass_adds(needs):
    hidden, weight, bias, target = case(6, 90, 12)
    hidden = [h.requires_grad_(needs) for h in hidden]
    options = {"bias": bias, "reduction": "mean", "pass_weights": (0.25, 2.0)}

    def loss(*passes, **more):
        return dmax_kernels.linear_oput_loss(*passes, weight, target, **options, **more)

    total, by_pass = loss(*hidden, by_pass=True)
    assert total.requires_grad == needs
    assert not by_pass.requires_grad
    expected = torch.stack([loss(hidden[0], None), loss(None, hidden[1])]).detach()
    assert_close(by_pass, expected, 1e-6)
    assert_close(total.detach(), expected.sum(), 1e-6)
    nothing = torch.full_like(target, -100)
    total, by_pass = dmax_kernels.linear_oput_loss(
        *hidden, weight, nothing, reduction="mean", by_pass=True
    )
    assert total == 0
    assert by_pass.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_scale(backend):
    values = torch.randn(5000, generator=torch.manual_seed(3))
    for dtype in (torch.float32, NARROW):
        for factor in (1.0, 0.3, -2.0, float("nan")):
            scaled = values.to(dtype)
            expected = (scaled.float() * torch.tensor(factor)).to(dtype)
            by = torch.tensor(factor)
            if backend == "triton":
                scaled = scaled.to(DEVICE)
                IMPLEMENTATIONS["linear_oput_loss_scale_"](scaled, by.to(DEVICE))
            else:
                torch.ops.dmax.linear_oput_loss_scale_(scaled, by)
            torch.testing.assert_close(scaled.cpu(), expected, rtol=0, atol=0, equal_nan=True)
    with pytest.raises(
        RuntimeError, match="scale_: grad is written in place and must be contiguous"
    ):
        torch.ops.dmax.linear_oput_loss_scale_(torch.ones(4, 4).t()[:2], torch.tensor(1.0))
    with pytest.raises(RuntimeError, match=r"scale_: factor must have shape \[\]"):
        torch.ops.dmax.linear_oput_loss_scale_(torch.ones(4), torch.ones(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_upstream_gradients_of_a_reduced_loss(dtype):
    """Whatever multiplies the loss, and however often the backward pass runs."""
    hidden, weight, bias, target = case(40, 90, 12, dtype)
    leaves = [t.clone().requires_grad_() for t in (*hidden, weight, bias)]

    def loss():
        return dmax_kernels.linear_oput_loss(
            *leaves[:3], target, bias=leaves[3], reduction="mean", pass_weights=(1.0, 0.5)
        )

    once = torch.autograd.grad(loss(), leaves)
    for factor in (0.0, 0.25, 3.0):
        for grad, one in zip(torch.autograd.grad(factor * loss(), leaves), once, strict=True):
            assert torch.equal(grad, (factor * one.float()).to(dtype))
    total = loss()
    total.backward(retain_graph=True)  # the gradients that came with the loss
    total.backward()  # those computed again
    for leaf, one in zip(leaves, once, strict=True):
        assert_close(leaf.grad, 2 * one.double(), 2.1 * ROUNDING[dtype], 1e-6 + 2e-2 * (
            0 if dtype == torch.float32 else one.abs().max().item()))  # fmt: skip
        leaf.grad = None
    (grad,) = torch.autograd.grad(loss(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not there"):
        grad.sum().backward()
