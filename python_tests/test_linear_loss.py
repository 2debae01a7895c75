"""linear_oput_loss and its gradients on every backend at hand, against float64."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from linear_losses import BACKENDS, IGNORED, NARROW, OPTIONS, case, in_float64, run
from tolerances import LOSS_ATOL, LOSS_RTOL, ROUNDING, assert_close
from triton_device import DEVICE, triton_op

import dmax_kernels
from dmax_kernels import reference

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's inf - inf

# The last options add no branch to Triton's kernels, and the interpreter takes seconds
COMBINATIONS = [(b, o) for b in BACKENDS for o in OPTIONS if b == "cpu" or o in OPTIONS[:2]]


# One row; parts of every tile; on the CPU several blocks of rows and of tokens with cut ones, under
# the interpreter, for time, two of each
def sizes(backend):
    small = backend == "triton" and DEVICE.type == "cpu"
    return [(1, 1, 1), (3, 300, 40), (33, 140, 33) if small else (300, 4200, 24)]


@pytest.mark.parametrize("dtype", [torch.float32, NARROW], ids=str)
@pytest.mark.parametrize(("backend", "options"), COMBINATIONS, ids=str)
def test_loss_of_exact_products(backend, options, dtype):
    for shape in sizes(backend):
        hidden, weight, bias, target = case(*shape, dtype, exact=True)
        ones = torch.ones(2, shape[0])
        for *passes, own_bias in ((*hidden, None), (None, hidden[1], bias)):
            expected, _ = in_float64(passes, weight, own_bias, target, ones, options)
            results = BACKENDS[backend](
                "linear_oput_loss", *passes, weight, target, own_bias, **options
            )
            for loss, logsumexp, right in zip(results[:2], results[2:], expected, strict=True):
                if right is None:
                    assert loss.shape == logsumexp.shape == (0,)
                    continue
                assert loss.dtype == logsumexp.dtype == torch.float32
                more = 1 if backend == "cpu" else 5  # float32 throughout
                assert_close(loss, right, LOSS_RTOL, more * LOSS_ATOL)


@pytest.mark.parametrize("dtype", [torch.float32, NARROW], ids=str)
@pytest.mark.parametrize(("backend", "options"), COMBINATIONS, ids=str)
def test_gradients(backend, options, dtype):
    """Both passes with a separate gradient per token, then the predicted pass alone."""
    hidden, weight, bias, target = case(*sizes(backend)[-1], dtype)
    grads = torch.randn(2, len(target), generator=torch.manual_seed(1))
    grads[:, -1] = 0
    for *passes, own_bias in ((*hidden, bias), (None, hidden[1], None)):
        _, expected = in_float64(passes, weight, own_bias, target, grads, options)
        _, actual = run(backend, passes, weight, own_bias, target, grads, **options)
        for gradient, right in zip(actual, expected, strict=True):
            if right is None:
                assert gradient.shape == (0,)
                continue
            # float32 sums; the gradient of 16-bit logits is 16 bits wide on a GPU, as eager's, and
            # that of bfloat16 logits may be on a CPU
            exact = dtype == torch.float32 or (backend == "cpu" and dtype == torch.float16)
            share = 3e-6 if exact else ROUNDING[dtype]
            assert gradient.dtype == dtype
            assert_close(gradient, right, ROUNDING[dtype], share * right.abs().max().item())


# Rows, tokens and columns of several parts with cut ones; odd and even tails of each
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 300, 40), (37, 4300, 271), (300, 2050, 24)])
def test_bfloat16_gradients(shape):
    """On the CPU a logit's gradient may be rounded to bfloat16 before the products, by 2^-8 of
    itself; the result is rounded once more. However many blocks: sums are float32."""
    (hidden, _), weight, bias, target = case(*shape, torch.bfloat16)
    grads = torch.randn(shape[0], generator=torch.manual_seed(1))
    _, actual = run("cpu", (hidden, None), weight, bias, target, (grads, None))
    keep = (target != IGNORED).double()[:, None]
    logits = hidden.double() @ weight.double().t() + bias.double()
    one_hot = F.one_hot(target.where(target != IGNORED, 0), shape[1])
    grad_logits = (logits.softmax(-1) - one_hot) * keep * grads.double()[:, None]
    ones = torch.ones(shape[0], 1).double()
    for gradient, a, b in (
        (actual[0], grad_logits, weight.double()),
        (actual[2], grad_logits.t(), hidden.double()),
        (actual[3][:, None], grad_logits.t(), ones),
    ):
        exact, magnitudes = a @ b, a.abs() @ b.abs()
        allowed = 2**-8 * (magnitudes + exact.abs()) + 3e-5 * magnitudes + 1e-7
        assert ((gradient.double() - exact).abs() <= allowed).all()


def fused_and_reference(inputs, **options):
    """((loss, gradients) of dmax_kernels, (loss, gradients) of the reference)."""
    results = []
    for op in (dmax_kernels, reference):
        hidden, weight, bias, target = inputs
        leaves = [t.clone().requires_grad_() for t in (*hidden, weight, bias)]
        loss = op.linear_oput_loss(*leaves[:3], target, bias=leaves[3], **options)
        results.append((loss, torch.autograd.grad(loss, leaves)))
    return results


# The reductions are shared with oput_loss and tested there: here that they reach the gradients
@pytest.mark.parametrize(
    "options",
    [
        {"reduction": "sum"},
        {"reduction": "mean", "pass_weights": (1.0, 0.25)},
        {"reduction": "mean", "num_tokens": torch.tensor(77), "label_smoothing": 0.2},
        {"reduction": "mean", "num_tokens": 11.5, "token_weight": torch.rand(40), "z_loss": 1e-2},
    ],
    ids=lambda options: "-".join(options),
)
def test_reductions(options):
    (loss, grads), (expected, expected_grads) = fused_and_reference(case(40, 90, 12), **options)
    assert loss.shape == ()
    assert_close(loss.detach(), expected.detach(), 2e-6)
    for grad, right in zip(grads, expected_grads, strict=True):
        assert_close(grad, right, 1e-5, 1e-6 * right.abs().max().item())


def test_reference_against_torch():
    hidden, weight, bias, target = case(40, 90, 12)
    mean = reference.linear_oput_loss(*hidden, weight, target, bias=bias, reduction="mean")
    expected = sum(F.cross_entropy(F.linear(h, weight, bias), target) for h in hidden)
    assert_close(mean, expected, 1e-5)


def test_only_what_is_needed_gets_a_gradient():
    hidden, weight, bias, target = case(40, 90, 12)
    every = [*hidden, weight, bias]
    ones = torch.ones(2, 40)
    _, expected = in_float64(hidden, weight, bias, target, ones, {})
    for needed in ((0,), (1,), (2,), (3,), (0, 2), (1, 3)):
        leaves = [t.clone().requires_grad_(i in needed) for i, t in enumerate(every)]
        masked, predicted = dmax_kernels.linear_oput_loss(*leaves[:3], target, bias=leaves[3])
        (masked.sum() + predicted.sum()).backward()  # grad_output is an expanded 1
        for i, leaf in enumerate(leaves):
            if i in needed:
                assert_close(leaf.grad, expected[i], 1e-4, 1e-5)
            else:
                assert leaf.grad is None
    with torch.no_grad():
        loss, absent = dmax_kernels.linear_oput_loss(hidden[0], None, weight, target)
    assert absent is None
    assert loss.sum() > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_ignored_rows_are_not_read(backend):
    hidden, weight, _, target = case(8, 90, 12)
    for h in hidden:
        h[target == IGNORED] = torch.nan
    one_pass = (hidden[0], None)
    (loss, *_), grads = run(backend, one_pass, weight, None, target.int(), (torch.ones(8), None))
    assert (loss[target == IGNORED] == 0).all()
    assert (grads[0][target == IGNORED] == 0).all()
    assert grads[2].isfinite().all()
    # 12 is a token here, and the one to ignore
    target = torch.full((8,), 12)
    loss, *_ = BACKENDS[backend]("linear_oput_loss", *one_pass, weight, target, ignore_index=12)
    assert (loss == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_learn(backend):
    """All ignored, and no rows at all: gradients are zeros, not what memory held."""
    hidden, weight, bias, _ = case(6, 90, 12)
    for rows in (6, 0):
        target = torch.full((rows,), IGNORED)
        passes = [h[:rows] for h in hidden]
        results, grads = run(backend, passes, weight, bias, target, torch.ones(2, rows))
        assert all((t == 0).all() and t.shape == (rows,) for t in results)
        for grad, t in zip(grads, (*passes, weight, bias), strict=True):
            assert (grad == 0).all()
            assert grad.shape == t.shape
    assert dmax_kernels.linear_oput_loss(*passes, weight, target, reduction="mean") == 0


def test_rows_without_a_softmax():
    """NaN and +inf poison their own row and what it adds to; a bias of -inf costs nothing."""
    hidden, weight, bias, target = case(6, 90, 12)
    target[:] = 5
    hidden[0][1] = torch.nan
    hidden[0][2] = torch.inf
    bias[80:] = -torch.inf  # how a padded vocabulary is cut off
    for backend in BACKENDS:
        (loss, *_), grads = run(
            backend, (hidden[0], None), weight, bias, target, (torch.ones(6), None)
        )
        assert loss.isnan().tolist() == [False, True, True, False, False, False], backend
        assert grads[0][[1, 2]].isnan().all()
        assert grads[0][[0, 3, 4, 5]].isfinite().all()
    clean, expected = (
        F.cross_entropy(F.linear(hidden[1], weight[:n], bias[:n]), target) for n in (90, 80)
    )
    fused = dmax_kernels.linear_oput_loss(
        None, hidden[1], weight, target, bias=bias, reduction="mean"
    )
    assert_close(fused, expected, 1e-6)
    assert_close(clean, expected, 1e-6)


def test_unknown_target():
    hidden, weight, _, _ = case(4, 90, 12)
    target = torch.tensor([3, 90, -1, 4])
    with pytest.raises(RuntimeError, match=r"linear_oput_loss: target must be -100 .*, got 90 at"):
        dmax_kernels.linear_oput_loss(*hidden, weight, target)
    one_pass = (hidden[0], None)
    (loss, *_), grads = run("triton", one_pass, weight, None, target, (torch.ones(4), None))
    assert loss.isnan().tolist() == [False, True, True, False]
    assert grads[0].isnan().all(-1).tolist() == [False, True, True, False]


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_and_shapes(backend):
    hidden, weight, bias, target = case(6, 90, 12)

    def everything(*arguments):
        results, grads = run(backend, *arguments)
        return *results, *grads

    ones = torch.ones(2, 6)
    expected = everything(hidden, weight, bias, target, ones)
    padded = torch.full((6, 31), 7.0)[:, :12].copy_(hidden[0])
    others = everything(
        (padded, hidden[1].t().contiguous().t()),
        weight.t().contiguous().t(),
        torch.stack([bias, bias], dim=1)[:, 0],
        target.int(),
        torch.ones(1).expand(2, 6),
    )
    shaped = everything(
        [h.view(2, 3, 12) for h in hidden], weight, bias, target.view(2, 3), ones.view(2, 2, 3)
    )
    for one, other, two_d in zip(expected, others, shaped, strict=True):
        assert_close(other, one, 1e-6, 1e-6)
        assert torch.equal(two_d.reshape(one.shape), one)
    assert shaped[0].shape == (2, 3)
    assert shaped[4].shape == (2, 3, 12)


def test_autograd_manners():
    hidden, weight, bias, target = case(40, 90, 12)
    leaves = [t.clone().requires_grad_() for t in (*hidden, weight, bias)]
    loss, other = dmax_kernels.linear_oput_loss(*leaves[:3], target, bias=leaves[3])
    loss.sum().backward(retain_graph=True)  # the other pass's loss is not used
    first = [leaf.grad.clone() for leaf in leaves]
    assert (first[1] == 0).all()
    loss.sum().backward()
    for leaf, grad, before in zip(leaves, first, (*hidden, weight, bias), strict=True):
        assert torch.equal(leaf.grad, 2 * grad)  # accumulates
        assert torch.equal(leaf.detach(), before)
    loss, other = dmax_kernels.linear_oput_loss(*leaves[:3], target)
    grads = torch.autograd.grad((loss * 0 + other * 0).sum(), leaves[:3])
    assert all((grad == 0).all() for grad in grads)
    loss, _ = dmax_kernels.linear_oput_loss(leaves[0], None, leaves[2], target)
    (grad,) = torch.autograd.grad(loss.sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not there"):
        grad.sum().backward()


def test_bits():
    """The same call repeats its bits. On the CPU the loss of a row among up to 8, both passes
    counted, has the bits of the row alone, whatever the threads."""
    hidden, weight, bias, target = case(300, 3000, 24, torch.bfloat16)
    threads = torch.get_num_threads()

    def losses_and_grads(rows=300):
        leaves = [h[:rows].clone().requires_grad_() for h in hidden]
        leaves.append(weight.clone().requires_grad_())
        losses = dmax_kernels.linear_oput_loss(*leaves, target[:rows], bias=bias)
        (losses[0].sum() + losses[1].sum()).backward()
        return *(loss.detach() for loss in losses), *(leaf.grad for leaf in leaves)

    expected = losses_and_grads()
    for one, again in zip(expected, losses_and_grads(), strict=True):
        assert torch.equal(one, again)
    few = losses_and_grads(4)[:2]
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        alone = losses_and_grads(1)[:2]
    finally:
        torch.set_num_threads(threads)
    for loss, among_four, among_all in zip(alone, few, expected[:2], strict=True):
        assert torch.equal(loss, among_four[:1])
        assert_close(loss, among_all[:1], LOSS_RTOL)
    # Under the interpreter and on a GPU alike: no atomics
    arguments = [t.to(NARROW) for t in (hidden[0][:5], hidden[1][:5], weight[:300])]
    losses = [triton_op("linear_oput_loss", *arguments, target[:5] % 300) for _ in range(2)]
    assert all(torch.equal(*pair) for pair in zip(*losses, strict=True))


@pytest.mark.parametrize("op", [reference, dmax_kernels], ids=["reference", "cpu"])
def test_autocast_casts_as_a_linear_layer_does(op):
    """float32 parameters and bfloat16 hidden states; gradients return in the parameters' dtype."""
    hidden, weight, bias, target = case(40, 90, 12)
    weight.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = op.linear_oput_loss(
            hidden[0].bfloat16(), None, weight, target, bias=bias, reduction="mean"
        )
        loss.backward()
    assert (loss.dtype, weight.grad.dtype) == (torch.float32, torch.float32)
    narrow = [t.detach().bfloat16() for t in (hidden[0], weight, bias)]
    exact = F.cross_entropy(
        F.linear(narrow[0].double(), narrow[1].double(), narrow[2].double()), target
    )
    assert_close(loss.detach(), exact, 1e-6)  # logits are not rounded to bfloat16
    # An op called from autocast's own code keeps float32 products
    wide = torch.ops.dmax.linear_oput_loss(hidden[0], None, weight.detach(), target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = torch.ops.dmax.linear_oput_loss(hidden[0], None, weight.detach(), target)
    assert torch.equal(wide[0], again[0])


def test_fullgraph_compile():
    def step(masked, predicted, weight, bias, target, count):
        return dmax_kernels.linear_oput_loss(
            masked, predicted, weight, target, bias=bias, reduction="mean", num_tokens=count
        )

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (5, 9):
        hidden, weight, bias, target = case(rows, 90, 12)
        leaves = [t.requires_grad_() for t in (*hidden, weight, bias)]
        count = torch.tensor(31.0)
        loss = compiled(*leaves, target, count)
        grads = torch.autograd.grad(loss, leaves)
        expected = step(*leaves, target, count)
        assert torch.equal(loss, expected)
        assert all(map(torch.equal, grads, torch.autograd.grad(expected, leaves)))


H, W, T = torch.randn(3, 4), torch.randn(9, 4), torch.zeros(3).long()


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((None, None, W, T), {}, "hidden_masked or hidden_predicted must be given, got neither"),
        ((H.double(), None, W, T), {}, "hidden_masked must be float32.*, got float64"),
        ((None, H[:, :3], W, T), {}, r"hidden_predicted must be \[..., D\] with D = 4 .*\[3, 3\]"),
        ((H, H[:2], W, T), {}, r"hidden_predicted must have shape \[3, 4\] .*, got \[2, 4\]"),
        ((H, H.half(), W, T), {}, "hidden_predicted must be float32, got float16"),
        ((H, None, W.half(), T), {}, "weight must be float32, got float16"),
        ((H, None, W[0], T), {}, r"weight must be \[V, D\] with V, D >= 1, got \[4\]"),
        ((H, None, W, T.float()), {}, "target must be int64 or int32, got float32"),
        ((H, None, W, T[:2]), {}, r"target must have shape \[3\] \(one token per row of hidden"),
        ((H, None, W, T), {"bias": W[:, 0].half()}, "bias must be float32, got float16"),
        ((H, None, W, T), {"bias": W[:5, 0]}, r"bias must have shape \[9\] .*, got \[5\]"),
        ((H, None, W, T), {"label_smoothing": -0.5}, r"label_smoothing must be in \[0, 1\]"),
        ((H, None, W, T), {"z_loss": -1.0}, "z_loss must be zero or positive and finite, got -1"),
    ],
)
def test_bad_input(arguments, options, message):
    with pytest.raises(RuntimeError, match="^linear_oput_loss: " + message):
        dmax_kernels.linear_oput_loss(*arguments, **options)


@pytest.mark.parametrize("op", [reference, dmax_kernels], ids=["reference", "cpu"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": "avg"}, "reduction must be one of .*, got 'avg'"),
        ({"token_weight": T[:2]}, r"token_weight must have target's shape \[3\], got \[2\]"),
        ({"num_tokens": 3}, "num_tokens is for reduction 'mean', got 'none'"),
        ({"num_tokens": -1, "reduction": "mean"}, "num_tokens must be .* at least 0 .*, got -1"),
        ({"num_tokens": T, "reduction": "mean"}, r"num_tokens must be .*, got shape \[3\]"),
    ],
)
def test_bad_reduction(op, options, message):
    with pytest.raises(ValueError, match="^linear_oput_loss: " + message):
        op.linear_oput_loss(H, None, W, T, **options)
    with pytest.raises(ValueError, match="^oput_loss: " + message):
        op.oput_loss(H, None, T, **options)


def test_memory():
    """Forward and backward at LLaDA-2.0's vocabulary: the joint passes take at most an eighth of
    what eager takes for them, and less than eager takes for one."""
    script = Path(__file__).parent.parent / "bench" / "memory.py"
    command = [sys.executable, str(script), "--rows", "128", "--dim", "64", "--threads", "1"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}  # on a GPU logits are kept (docs)
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    extra = {line.split()[0]: float(line.split()[-1]) for line in result.stdout.splitlines()[1:]}
    assert extra["fused"] <= extra["eager"] / 8
    assert extra["fused"] < extra["alternating"]
