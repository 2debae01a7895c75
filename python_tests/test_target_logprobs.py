"""target_logprobs, linear_target_logprobs and certainty forcing, against float64."""

import pytest
import torch
from tolerances import ROUNDING, assert_close

import dmax_kernels
from dmax_kernels import reference
from dmax_kernels.ops import _logprob_blocks

IGNORED = -100
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def exact(logits, target, temperature):
    """logprob and entropy in float64, with autograd."""
    x = logits.double() / temperature
    log_p = x.log_softmax(-1)
    keep = target != IGNORED
    logprob = log_p.gather(-1, target.where(keep, 0).long().unsqueeze(-1)).squeeze(-1)
    entropy = -(log_p.exp() * log_p.clamp(min=-1e30)).sum(-1)
    return torch.where(keep, logprob, 0.0), torch.where(keep, entropy, 0.0)


def rows_of_logits(dtype):
    """Flat, sure, one-hot, cut-off and far-off rows, and their targets."""
    generator = torch.manual_seed(4)
    logits = 3 * torch.randn(2, 6, 300, generator=generator)
    target = torch.randint(0, 300, (2, 6), generator=generator)
    logits[0, 1, 17] = 25.0
    target[0, 1] = 17
    logits[0, 2] = -torch.inf
    logits[0, 2, 40] = 1.0
    target[0, 2] = 40
    logits[0, 3, 100:] = -torch.inf
    target[0, 3] = 5
    logits[0, 4] += 3000.0
    target[0, 5] = IGNORED
    logits[1, 0] = 0.0
    target[1, 1] = logits[1, 1].argmax()
    return logits.to(dtype), target


@pytest.fixture(params=["logits", "hidden"])
def way(request, monkeypatch):
    """Stored logits, or those of hidden states that are their own weight, in blocks of 64."""
    if request.param == "logits":
        return dmax_kernels.target_logprobs
    monkeypatch.setattr(_logprob_blocks, "BLOCK_BYTES", 1)
    monkeypatch.setattr(_logprob_blocks, "LEAST_COLUMNS", 64)

    def through_bias(logits, target, **options):
        """Row by row, as the bias of a head without inputs: every block's logits are exact."""
        vocab = logits.shape[-1]
        hidden, weight = logits.new_zeros(1, 2), logits.new_zeros(vocab, 2)
        results = [
            dmax_kernels.linear_target_logprobs(hidden, weight, t.view(1), bias=x, **options)
            for x, t in zip(logits.reshape(-1, vocab), target.reshape(-1), strict=True)
        ]
        return dmax_kernels.TargetLogprobs(
            *(torch.cat(field).view(target.shape) for field in zip(*results, strict=True))
        )

    return through_bias


@pytest.mark.parametrize("temperature", [1.0, 0.3, 5.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(way, dtype, temperature):
    logits, target = rows_of_logits(dtype)
    logits.requires_grad_()
    found = way(logits, target, temperature=temperature)
    leaf = logits.detach().double().requires_grad_()
    logprob, entropy = exact(leaf, target, temperature)
    assert found.logprob.dtype == found.entropy.dtype == torch.float32
    assert_close(found.logprob.detach(), logprob.detach(), 2e-6, 2e-7)
    assert_close(found.entropy.detach(), entropy.detach(), 4e-6, 1e-6)
    token = logits.detach().float().argmax(-1).masked_fill(target == IGNORED, -1)
    assert torch.equal(found.token, token)
    assert torch.equal(found.correct, token == target)

    up = torch.randn(2, 2, 6, generator=torch.manual_seed(5))
    (up[0] * found.logprob + up[1] * found.entropy).sum().backward()
    (up[0] * logprob + up[1] * entropy).sum().backward()
    # At -inf the exact gradient is 0, which autograd finds as 0 times infinity
    expected = torch.where(logits.isinf() | leaf.grad.isnan(), 0.0, leaf.grad)
    assert_close(logits.grad, expected, 2 * ROUNDING[dtype], 3e-6 / temperature)
    assert (logits.grad[target == IGNORED] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_the_logprob_alone(way, dtype):
    """The loss's kernel makes it; also where a common offset would cost a logsumexp its digits."""
    logits, target = rows_of_logits(dtype)
    logits.requires_grad_()
    leaf = logits.detach().double().requires_grad_()
    up = torch.randn(2, 6, generator=torch.manual_seed(8))
    (up * way(logits, target, temperature=0.7).logprob).sum().backward()
    (up * exact(leaf, target, 0.7)[0]).sum().backward()
    assert_close(logits.grad, leaf.grad, 2 * ROUNDING[dtype], 2e-6)
    assert (logits.grad[target == IGNORED] == 0).all()


def test_rows_without_a_softmax(way):
    logits, target = torch.zeros(4, 200), torch.zeros(4, dtype=torch.int64)
    logits[0, 150] = torch.nan
    logits[1, 130] = torch.inf
    logits[2] = -torch.inf
    logits.requires_grad_()
    found = way(logits, target)
    assert found.token.tolist() == [150, 130, 0, 0]
    for values in found[:2]:
        assert values.isnan().tolist() == [True, True, True, False]
    for sums in (found.logprob + found.entropy, found.logprob, found.entropy):
        (grad,) = torch.autograd.grad(sums.sum(), logits, retain_graph=True)
        assert grad.isnan().all(-1).tolist() == [True, True, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_head(dtype, monkeypatch):
    """Values and every gradient through the product; an ignored row's hidden state is not used."""
    monkeypatch.setattr(_logprob_blocks, "BLOCK_BYTES", 1)
    monkeypatch.setattr(_logprob_blocks, "LEAST_COLUMNS", 128)
    generator = torch.manual_seed(6)
    hidden = torch.randn(3, 5, 16, generator=generator).to(dtype)
    weight = torch.randn(300, 16, generator=generator).to(dtype)
    bias = torch.randn(300, generator=generator).to(dtype)
    target = torch.randint(0, 300, (3, 5), generator=generator, dtype=torch.int32)
    target[1] = IGNORED
    up = torch.randn(2, 3, 5, generator=generator)
    wide = [t.double().requires_grad_() for t in (hidden, weight, bias)]
    values = exact(wide[0] @ wide[1].t() + wide[2], target, 0.7)
    expected = torch.autograd.grad((up[0] * values[0] + up[1] * values[1]).sum(), wide)
    leaves = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
    with torch.no_grad():
        leaves[0][1] = torch.nan
    found = dmax_kernels.linear_target_logprobs(
        *leaves[:2], target, bias=leaves[2], temperature=0.7
    )
    assert_close(found.logprob.detach(), values[0].detach(), 3e-6, 3e-6)
    assert_close(found.entropy.detach(), values[1].detach(), 4e-6, 3e-6)
    grads = torch.autograd.grad((up[0] * found.logprob + up[1] * found.entropy).sum(), leaves)
    for grad, right in zip(grads, expected, strict=True):
        right = right.where(~right.isnan(), 0.0)
        share = 3e-6 if dtype == torch.float32 else ROUNDING[dtype]
        assert_close(grad, right, ROUNDING[dtype], 3 * share * right.abs().max().item())


@pytest.mark.parametrize(
    "function",
    [
        lambda h, w, t: dmax_kernels.target_logprobs(h @ w.t(), t).logprob,
        lambda h, w, t: dmax_kernels.target_logprobs(h @ w.t(), t).entropy,
        lambda h, w, t: dmax_kernels.linear_target_logprobs(h * h, w, t).logprob,
        lambda h, w, t: dmax_kernels.linear_token_logprobs(h * h, w, t).logprob,
    ],
)
def test_a_second_derivative_is_an_error(function):
    """What is around the function has one, from which the function's own part would be missing."""
    generator = torch.manual_seed(10)
    hidden, weight = (torch.randn(n, 8, generator=generator).requires_grad_() for n in (5, 40))
    total = function(hidden, weight, torch.arange(5)).sum()
    (gradient,) = torch.autograd.grad(total, hidden, create_graph=True)
    (once,) = torch.autograd.grad(function(hidden, weight, torch.arange(5)).sum(), hidden)
    assert torch.equal(gradient, once)
    with pytest.raises(RuntimeError, match=r"^(linear_)?t.*_logprobs: has no second derivative"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("op", [reference, dmax_kernels], ids=["reference", "fused"])
def test_certainty_forcing(op, temperature):
    """Cross-entropy, plus beta times the entropy where the arg-max is the target."""
    logits, target = rows_of_logits(torch.float32)
    leaf = logits.double().requires_grad_()
    logprob, _ = exact(leaf, target, 1.0)
    _, entropy = exact(leaf, target, temperature)
    right = logits.argmax(-1) == target
    weight = torch.rand(2, 6, generator=torch.manual_seed(7))
    loss = -logprob + 0.4 * torch.where(right, entropy, 0.0)
    assert right.sum() >= 3
    mean = (loss * weight).sum() / 11
    mean.backward()
    logits.requires_grad_()
    options = {"beta": 0.4, "temperature": temperature}
    each = op.certainty_forcing_loss(logits, target, reduction="none", **options)
    assert_close(each.detach(), loss.detach(), 5e-6, 2e-6)
    fused = op.certainty_forcing_loss(logits, target, token_weight=weight, **options)
    assert_close(fused.detach(), mean.detach(), 5e-6)
    fused.backward()
    expected = torch.where(logits.isinf() | leaf.grad.isnan(), 0.0, leaf.grad)
    if op is dmax_kernels:  # plain autograd leaves NaN at -inf
        # At another temperature oput_loss takes part, which keeps a logsumexp of 3000 in float32
        assert_close(logits.grad, expected, 1e-5 if temperature == 1 else 2e-4, 1e-6)


def test_certainty_forcing_of_a_head():
    generator = torch.manual_seed(8)
    hidden, weight = (torch.randn(n, 8, generator=generator) for n in (9, 40))
    target = (hidden @ weight.t()).argmax(-1)
    target[::3] = 7
    target[4] = IGNORED
    for temperature in (1.0, 2.0):
        results = []
        for op in (reference, dmax_kernels):
            leaves = [t.clone().requires_grad_() for t in (hidden, weight)]
            loss = op.linear_certainty_forcing_loss(
                *leaves, target, temperature=temperature, reduction="sum"
            )
            results.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
        for got, want in zip(results[1], results[0], strict=True):
            assert_close(got, want, 1e-5, 1e-5)


def test_reference_is_the_same():
    logits, target = rows_of_logits(torch.float32)
    pairs = zip(
        dmax_kernels.target_logprobs(logits, target, temperature=2.0),
        reference.target_logprobs(logits, target, temperature=2.0),
        strict=True,
    )
    for got, want in pairs:
        assert_close(got, want, 1e-5, 1e-5)


X, T = torch.randn(3, 9), torch.zeros(3).long()


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((X.double(), T), {}, "logits must be float32, bfloat16 or float16, got torch.float64"),
        ((X, T.float()), {}, "target must be int64 or int32, got torch.float32"),
        ((X, T[:2]), {}, r"target must have shape \[3\] .*, got \[2\]"),
        ((X, T + 9), {}, r"target must be -100 .* in \[0, 9\), got 9 at position 0"),
        ((X, T), {"temperature": 0.0}, "temperature must be 1e-30 to 1e30, got 0"),
    ],
)
def test_bad_input(arguments, options, message):
    with pytest.raises(ValueError, match="^target_logprobs: " + message):
        dmax_kernels.target_logprobs(*arguments, **options)


def test_bad_head():
    weight = torch.randn(9, 4)
    for hidden, w, bias, message in (
        (X, weight, None, r"weight must be \[V, D\] with D = 9 .*, got \[9, 4\]"),
        (
            X[:, :4],
            weight.half(),
            None,
            "weight must be torch.float32 as hidden, got .*16",
        ),
        (X[:, :4], weight, torch.zeros(3), r"bias must have shape \[9\], got \[3\]"),
    ):
        with pytest.raises(ValueError, match="^linear_target_logprobs: " + message):
            dmax_kernels.linear_target_logprobs(hidden, w, T, bias=bias)
    with pytest.raises(ValueError, match="^certainty_forcing_loss: reduction must be one of"):
        dmax_kernels.certainty_forcing_loss(X, T, reduction="avg")
