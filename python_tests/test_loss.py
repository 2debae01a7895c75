"""oput_loss, its gradient, and its in-place form; CUDA's are in test_simt_loss.py."""

import float64
import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, SMALL_VOCABS, stacked_rows, strided_copies
from tolerances import LOSS_ATOL, LOSS_RTOL, ROUNDING, assert_close

import dmax_kernels
from dmax_kernels import reference

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's inf - inf

OPTIONS = (
    {},
    {"label_smoothing": 0.1},
    {"z_loss": 1e-3},
    {"label_smoothing": 0.3, "z_loss": 1e-2},
    {"label_smoothing": 1.0},
    {"temperature": 0.3},
    {"label_smoothing": 0.3, "z_loss": 1e-2, "temperature": 1.7},
)
FINITE = slice(0, 11)  # the rows of stacked_rows without NaN or infinities


def random_case(dtype, vocab_size=300, tokens=40, ignored=(3, 17)):
    generator = torch.manual_seed(vocab_size)
    logits = [
        (3 * torch.randn(tokens, vocab_size, generator=generator)).to(dtype) for _ in range(2)
    ]
    target = torch.randint(0, vocab_size, (tokens,), generator=generator)
    target[list(ignored)] = -100
    return logits, target


def loss_in_float64(logits, target, **options):
    safe = target.clamp(min=0)
    return torch.where(target < 0, 0.0, float64.token_loss(logits, safe, **options))


# The tolerance holds for the float32 kernels on every finite edge case: peaked rows with a loss of
# 1e-20, a common offset of 1e4, float16's largest values
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", SMALL_VOCABS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_edge_cases(dtype, vocab_size, options):
    _, logits = stacked_rows(vocab_size, dtype)
    rows = [i for i, row in enumerate(logits) if row.isfinite().all()]
    logits = logits[rows]
    for target_id in {0, 3 % vocab_size, vocab_size - 1}:
        target = torch.full((len(rows),), target_id)
        loss, _ = dmax_kernels.oput_loss(logits, None, target, **options)
        expected = float64.token_loss(logits, target, **options)
        assert loss.dtype == torch.float32
        assert_close(loss, expected, LOSS_RTOL, LOSS_ATOL)
        if not options:
            assert (loss >= 0).all()


@pytest.mark.parametrize("vocab_size", [127, 5000])
def test_rows_that_are_not_finite(vocab_size):
    """As log_softmax: NaN and +inf poison their own row only; -inf elsewhere costs nothing."""
    names, logits = stacked_rows(vocab_size, torch.float32)
    target = torch.full((len(names),), 4)
    loss, _ = dmax_kernels.oput_loss(logits, None, target)
    expected = F.cross_entropy(logits.double(), target, reduction="none")
    # log_softmax of a +inf row is NaN everywhere but at finite targets, where it is -inf
    expected = expected.masked_fill((logits == torch.inf).any(dim=-1), torch.nan)
    assert_close(loss, expected, LOSS_RTOL, LOSS_ATOL)
    leaf = logits.clone().requires_grad_()
    dmax_kernels.oput_loss(leaf, None, target)[0].sum().backward()
    broken = loss.isnan()
    assert leaf.grad[broken].isnan().all()
    assert leaf.grad[~broken].isfinite().all()


@pytest.mark.parametrize("num_tokens", [1, 3, 8])
def test_large_vocabulary(num_tokens):
    """With few tokens, threads share the vocabulary; the loss of a token keeps its bits."""
    generator = torch.manual_seed(6)
    logits = 4 * torch.randn(8, 157184, generator=generator).bfloat16()
    target = torch.randint(0, 157184, (8,), generator=generator)
    loss, _ = dmax_kernels.oput_loss(logits, None, target)
    fewer, _ = dmax_kernels.oput_loss(logits[:num_tokens], None, target[:num_tokens])
    assert torch.equal(fewer, loss[:num_tokens])
    assert_close(loss, float64.token_loss(logits, target), LOSS_RTOL, LOSS_ATOL)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [1, 7, 300, 2049])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradient(dtype, vocab_size, options):
    """Both passes with different weights per token, against float64 autograd."""
    logits, target = random_case(dtype, vocab_size)
    weights = torch.rand(2, len(target), generator=torch.manual_seed(1)) - 0.3
    leaves = [x.clone().requires_grad_() for x in logits]
    losses = dmax_kernels.oput_loss(*leaves, target, **options)
    (losses[0] * weights[0] + losses[1] * weights[1]).sum().backward()
    for x, leaf, weight in zip(logits, leaves, weights, strict=True):
        wide = x.double().requires_grad_()
        (loss_in_float64(wide, target, **options) * weight).sum().backward()
        # The rounding of the saved logsumexp, which is 1 / T as large, and once more divided by T
        atol = 3e-7 / options.get("temperature", 1.0) ** 2
        assert_close(leaf.grad, wide.grad, ROUNDING[dtype], atol)
        assert (leaf.grad[target < 0] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("op", [reference, dmax_kernels], ids=["reference", "cpu"])
def test_in_place(op, dtype, options):
    logits, target = random_case(dtype)
    logits[0][3] = torch.nan  # an ignored row is not read, and gets gradient 0
    grad = torch.randn(len(target), generator=torch.manual_seed(2))
    written = [x.clone() for x in logits]
    losses = op.oput_loss_and_grad_(*written, target, grad, None, **options)
    for x, gradient, loss, weight in zip(
        logits, written, losses, (grad, torch.ones_like(grad)), strict=True
    ):
        wide = x.double().nan_to_num().requires_grad_()
        expected = loss_in_float64(wide, target, **options)
        expected.backward(weight.double())
        assert_close(loss, expected.detach(), 1e-5, 1e-6)
        assert_close(gradient, wide.grad, ROUNDING[dtype], 1e-6)
        assert (gradient[target < 0] == 0).all()


def test_in_place_at_large_logits():
    """Two equal logits of 65504 have 1/2 each, though logsumexp has steps of 1/128 there."""
    logits = torch.zeros(1, 41)
    logits[0, :2] = 65504.0
    dmax_kernels.oput_loss_and_grad_(logits, None, torch.tensor([30]))
    expected = torch.zeros(1, 41)
    expected[0, :2], expected[0, 30] = 0.5, -1.0
    assert_close(logits, expected, 2e-6, 1e-30)


def test_in_place_equals_autograd_to_rounding():
    logits, target = random_case(torch.float32)
    leaf = logits[0].clone().requires_grad_()
    loss, _ = dmax_kernels.oput_loss(leaf, None, target)
    loss.sum().backward()
    written = logits[0].clone()
    in_place, absent = dmax_kernels.oput_loss_and_grad_(written, None, target)
    assert absent is None
    assert torch.equal(in_place, loss)
    assert_close(written, leaf.grad, 1e-5, 1e-7)


def test_either_pass_may_be_absent():
    logits, target = random_case(torch.float32)
    both = dmax_kernels.oput_loss(*logits, target)
    masked, absent = dmax_kernels.oput_loss(logits[0], None, target)
    assert absent is None
    assert torch.equal(masked, both[0])
    absent, predicted = dmax_kernels.oput_loss(None, logits[1], target)
    assert absent is None
    assert torch.equal(predicted, both[1])


@pytest.mark.parametrize("op", [reference, dmax_kernels], ids=["reference", "cpu"])
def test_temperature_divides_the_logits(op):
    """Powers of two divide without rounding: one loss both ways, and 1 / T of the gradient."""
    (logits, _), target = random_case(torch.float32)
    for temperature in (0.25, 4.0):
        leaves = [logits.clone().requires_grad_(), (logits / temperature).requires_grad_()]
        of_op, _ = op.oput_loss(leaves[0], None, target, temperature=temperature)
        divided, _ = op.oput_loss(leaves[1], None, target)
        (of_op + 2 * divided).sum().backward()
        assert_close(of_op.detach(), divided.detach(), 1e-6, 1e-7)
        grad = leaves[1].grad / (2 * temperature)
        assert_close(leaves[0].grad, grad, 1e-5, 1e-7 / temperature)


@pytest.mark.parametrize("temperature", [1e-3, 1e3])
def test_far_temperatures_on_the_edge_list(temperature):
    _, logits = stacked_rows(300, torch.float32)
    logits = logits[[i for i, row in enumerate(logits) if row.isfinite().all()]]
    target = torch.full((len(logits),), 3)
    loss, _ = dmax_kernels.oput_loss(logits, None, target, temperature=temperature)
    expected = float64.token_loss(logits, target, temperature=temperature)
    assert_close(loss, expected, LOSS_RTOL, LOSS_ATOL)
    wide = logits.double().requires_grad_()
    float64.token_loss(wide, target, temperature=temperature).sum().backward()
    dmax_kernels.oput_loss_and_grad_(logits, None, target, temperature=temperature)
    assert_close(logits, wide.grad, 2e-6, 3e-7 / temperature)


# The reductions against torch's own cross-entropy, whose mean over kept targets is the same number
@pytest.mark.parametrize("op", [reference, dmax_kernels], ids=["reference", "cpu"])
def test_reductions(op):
    (masked, predicted), target = random_case(torch.float32)
    leaves = [masked.clone().requires_grad_(), predicted.clone().requires_grad_()]
    for reduction in ("sum", "mean"):
        total = op.oput_loss(*leaves, target, reduction=reduction, pass_weights=(1.0, 0.5))
        expected = F.cross_entropy(masked, target, reduction=reduction)
        expected = expected + 0.5 * F.cross_entropy(predicted, target, reduction=reduction)
        assert_close(total.detach(), expected, 1e-5)
    grads = torch.autograd.grad(total, leaves)
    wide = [masked.double().requires_grad_(), predicted.double().requires_grad_()]
    expected = F.cross_entropy(wide[0], target) + 0.5 * F.cross_entropy(wide[1], target)
    for grad, wide_grad in zip(grads, torch.autograd.grad(expected, wide), strict=True):
        assert_close(grad, wide_grad, 1e-5, 1e-9)

    for zero in (0, torch.tensor(0), torch.tensor(0.0)):  # a global batch without a target
        leaf, nothing = masked.clone().requires_grad_(), torch.full_like(target, -100)
        empty = op.oput_loss(leaf, None, nothing, reduction="mean", num_tokens=zero)
        assert empty.dtype == torch.float32
        assert empty == 0
        (grad,) = torch.autograd.grad(empty, leaf)
        assert not grad.any()

    # A global count averages over ranks; token weights multiply both passes
    count = torch.tensor(100.0)
    assert_close(
        op.oput_loss(masked, None, target, reduction="mean", num_tokens=count),
        F.cross_entropy(masked, target, reduction="sum") / 100,
        1e-5,
    )
    weight = torch.rand(len(target))
    losses = op.oput_loss(masked, predicted, target, token_weight=weight)
    plain = op.oput_loss(masked, predicted, target)
    for weighted, loss in zip(losses, plain, strict=True):
        assert torch.equal(weighted, loss * weight)
    wide, _ = op.oput_loss(masked, None, target, token_weight=weight.double())
    assert wide.dtype == torch.float32
    assert torch.equal(wide, losses[0])


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("op", [reference, dmax_kernels], ids=["reference", "cpu"])
def test_what_each_pass_adds_to_a_reduced_loss(op, reduction):
    logits, target = random_case(torch.float32)
    leaves = [x.clone().requires_grad_() for x in logits]
    options = {"reduction": reduction, "pass_weights": (0.25, 2.0)}
    for passes in (leaves, (leaves[0], None), (None, leaves[1])):
        total, by_pass = op.oput_loss(*passes, target, **options, by_pass=True)
        assert torch.equal(total, op.oput_loss(*passes, target, **options))
        assert not by_pass.requires_grad
        alone = [(x, None) if i == 0 else (None, x) for i, x in enumerate(passes)]
        expected = [0.0 if x is None else op.oput_loss(*one, target, **options).item()
                    for x, one in zip(passes, alone, strict=True)]  # fmt: skip
        assert_close(by_pass, torch.tensor(expected), 1e-6)
    with pytest.raises(ValueError, match="by_pass is for the reductions 'sum' and 'mean', got 'n"):
        op.oput_loss(*logits, target, by_pass=True)


@pytest.mark.parametrize("op", [reference, dmax_kernels], ids=["reference", "cpu"])
def test_nothing_to_learn(op):
    """All targets ignored: loss 0 (torch's mean gives NaN) and gradient 0; zero rows likewise."""
    logits = torch.randn(4, 9, requires_grad=True)
    target = torch.full((4,), -100)
    loss = op.oput_loss(logits, None, target, reduction="mean")
    loss.backward()
    assert loss == 0
    assert (logits.grad == 0).all()
    assert op.oput_loss(torch.ones(0, 9), None, target[:0], reduction="mean") == 0


def test_ignore_index_inside_the_vocabulary():
    logits, target = random_case(torch.float32, ignored=())
    target[5] = 8
    loss, _ = dmax_kernels.oput_loss(logits[0], None, target, ignore_index=8)
    assert (loss[target == 8] == 0).all()
    assert (loss[target != 8] > 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_and_integer_targets(dtype):
    _, logits = stacked_rows(2049, dtype)
    logits = logits[FINITE]
    target = torch.arange(len(logits)) * 100
    expected, _ = dmax_kernels.oput_loss(logits, None, target)
    for name, copy in strided_copies(logits).items():
        leaf = copy.detach().requires_grad_()
        loss, _ = dmax_kernels.oput_loss(leaf, None, target.int())
        assert torch.equal(loss, expected), name
        loss.sum().backward()  # grad_output is an expanded 1
        assert leaf.grad.isfinite().all(), name
    shaped, _ = dmax_kernels.oput_loss(logits[:10].view(2, 5, -1), None, target[:10].view(2, 5))
    assert torch.equal(shaped, expected[:10].view(2, 5))


def test_autograd_manners():
    (masked, predicted), target = random_case(torch.float32)
    with torch.no_grad():
        loss, _ = dmax_kernels.oput_loss(masked, None, target)
    assert loss.sum() > 0
    leaf = masked.clone().requires_grad_()
    before = leaf.detach().clone()
    loss, other = dmax_kernels.oput_loss(leaf, predicted, target)  # one of the two needs a gradient
    loss.sum().backward(retain_graph=True)
    first = leaf.grad.clone()
    loss.sum().backward()
    assert torch.equal(leaf.grad, 2 * first)  # accumulates
    assert torch.equal(leaf.detach(), before)  # inputs unchanged
    loss, other = dmax_kernels.oput_loss(leaf, predicted, target)
    (zero,) = torch.autograd.grad((loss * 0 + other.detach()).sum(), leaf)
    assert (zero == 0).all()
    loss, _ = dmax_kernels.oput_loss(leaf, None, target)
    (grad,) = torch.autograd.grad(loss.sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not there"):
        grad.sum().backward()


def test_gradient_repeats_to_the_bit():
    logits, target = random_case(torch.bfloat16, vocab_size=5000)
    threads = torch.get_num_threads()
    grads = []
    try:
        for num_threads in (1, 2, 4):
            torch.set_num_threads(num_threads)
            leaf = logits[0].clone().requires_grad_()
            dmax_kernels.oput_loss(leaf, None, target)[0].sum().backward()
            grads.append(leaf.grad)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[0], grads[2])


def test_autocast_leaves_the_dtypes_alone():
    logits, target = random_case(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = dmax_kernels.oput_loss(logits[0], None, target)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, dmax_kernels.oput_loss(logits[0], None, target)[0])


# ---- Errors

X, T = torch.randn(3, 9), torch.zeros(3).long()


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((None, None, T), {}, "logits_masked or logits_predicted must be given, got neither"),
        ((X.double(), None, T), {}, "logits_masked must be float32.*, got float64"),
        ((None, X.long(), T), {}, "logits_predicted must be float32.*, got int64"),
        ((X, X[:2], T), {}, r"logits_predicted must have shape \[3, 9\] .*, got \[2, 9\]"),
        ((X, X.half(), T), {}, "logits_predicted must be float32, got float16"),
        ((X, None, T.float()), {}, "target must be int64 or int32, got float32"),
        ((X, None, T[:2]), {}, r"target must have shape \[3\] .*, got \[2\]"),
        ((X, None, T + 9), {}, r"target must be -100 .* in \[0, 9\), got 9 at position 0"),
        ((X, None, T - 1), {}, r"target must be -100 .*, got -1 at position 0"),
        ((X, None, T), {"label_smoothing": 1.5}, r"label_smoothing must be in \[0, 1\], got 1.5"),
        ((X, None, T), {"z_loss": -1.0}, "z_loss must be zero or positive and finite, got -1"),
        ((X, None, T), {"temperature": 0.0}, "temperature must be .*, got 0"),
    ],
)
def test_bad_input(arguments, options, message):
    with pytest.raises(RuntimeError, match="^oput_loss: " + message):
        dmax_kernels.oput_loss(*arguments, **options)
    before = [None if x is None else x.clone() for x in arguments]
    with pytest.raises(RuntimeError, match="^oput_loss_and_grad_: " + message):
        dmax_kernels.oput_loss_and_grad_(*arguments, **options)
    for x, same in zip(arguments, before, strict=True):
        assert x is None or torch.equal(x, same)


def test_bad_input_of_the_python_half():
    with pytest.raises(ValueError, match=r"oput_loss: reduction must be one of .*, got 'avg'"):
        dmax_kernels.oput_loss(X, None, T, reduction="avg")
    with pytest.raises(ValueError, match=r"token_weight must have target's shape \[3\], got \[2\]"):
        dmax_kernels.oput_loss(X, None, T, token_weight=torch.ones(2))
    with pytest.raises(RuntimeError, match=r"oput_loss_and_grad_: grad_masked must be float32"):
        dmax_kernels.oput_loss_and_grad_(X.clone(), None, T, torch.ones(3).double())
    for bad in (X.t().contiguous().t(), X[:1].expand(3, 9)):
        with pytest.raises(RuntimeError, match="logits_masked is written in place"):
            dmax_kernels.oput_loss_and_grad_(bad, None, T)
