"""The differentiable ops under torch.func: right derivatives, or one clear sentence."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

import dmax_kernels
from dmax_kernels import reference

# Ops without a batching rule loop over the batch, which is intended
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")

N, V, D = 5, 19, 6


def functions():
    """name -> (function of the package's module and one differentiated tensor, that tensor)."""
    generator = torch.manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    target = torch.randint(0, V, (N,), generator=generator)
    target[1] = -100
    weight = randn(V, D)
    token = torch.randint(0, V, (N, 2), generator=generator)
    confidence = torch.rand(N, 2, generator=generator) / 2
    masked = torch.arange(N) == 2
    out = randn(N, D)
    other = randn(N, V)
    return {
        "oput_loss": (
            lambda ops, x: ops.oput_loss(x, other, target, label_smoothing=0.1, reduction="mean"),
            randn(N, V),
        ),
        "linear_oput_loss": (
            lambda ops, x: ops.linear_oput_loss(x, None, weight, target, reduction="sum"),
            randn(N, D),
        ),
        "linear_oput_loss of the weight": (
            lambda ops, x: ops.linear_oput_loss(out, out, x, target, z_loss=0.1, reduction="sum"),
            weight,
        ),
        "token_logprobs": (lambda ops, x: ops.token_logprobs(x, target)[0].square().sum(), other),
        "hybrid_embedding": (
            lambda ops, x: ops.hybrid_embedding(x, token, confidence, masked, V - 1).mul(out).sum(),
            weight,
        ),
    }


@pytest.mark.parametrize("name", functions())
def test_reverse_mode(name):
    function, x = functions()[name]
    expected = grad(lambda x: function(reference, x))(x)
    for transform in (grad, jacrev, lambda f: torch.compile(grad(f), fullgraph=True)):
        actual = transform(lambda x: function(dmax_kernels, x))(x)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", functions())
def test_gradients_per_sample(name):
    function, x = functions()[name]
    batch = torch.stack([x, x * 0.5, x - 1])
    actual = vmap(grad(lambda x: function(dmax_kernels, x)))(batch)
    for one, sample in zip(actual, batch, strict=True):
        expected = grad(lambda x: function(reference, x))(sample)
        torch.testing.assert_close(one, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", functions())
def test_what_has_no_derivative_says_so(name):
    function, x = functions()[name]

    def of(x):
        return function(dmax_kernels, x)

    op = name.split(" ")[0]
    backward = "oput_loss" if op == "token_logprobs" else op
    second = f"^{backward}_backward: has no gradient; second derivatives are not there$"
    forward = f"^{op}: has no forward-mode derivative$"
    with pytest.raises(RuntimeError, match=second):
        grad(lambda x: grad(of)(x).square().sum())(x)
    with pytest.raises(RuntimeError, match=second):
        jacrev(jacrev(of))(x)
    for transform in (jacfwd, hessian):
        with pytest.raises(RuntimeError, match=forward):
            transform(of)(x)
    with pytest.raises(RuntimeError, match=forward):
        jvp(of, (x,), (x,))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=forward):
        of(forward_ad.make_dual(x, x))


def test_no_tangent_no_objection():
    """An op beside the differentiated part of a jvp, and one without any gradient."""
    logits, x = torch.randn(3, 9), torch.randn(3)
    _, tangent = jvp(lambda x: x * dmax_kernels.top1_confidence(logits)[1], (x,), (x,))
    assert torch.equal(tangent, x * dmax_kernels.top1_confidence(logits)[1])
    with pytest.raises(RuntimeError, match="^top1_confidence: has no gradient; detach the logits$"):
        grad(lambda x: dmax_kernels.top1_confidence(x)[1].sum())(logits)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, target: dmax_kernels.linear_token_logprobs(x, x, target)[0].sum(),
        lambda x, target: dmax_kernels.target_logprobs(x, target).logprob.sum(),
        lambda x, target: dmax_kernels.linear_target_logprobs(x, x, target).entropy.sum(),
        dmax_kernels.certainty_forcing_loss,
        lambda x, target: dmax_kernels.linear_certainty_forcing_loss(x, x, target),
    ],
)
def test_functions_of_torch_autograd_alone(function):
    """An error, and no silent zero; what their backward pass needs is no output of theirs."""
    for transform in (grad, lambda f: lambda x: vmap(grad(f))(x[None])):
        with pytest.raises(
            RuntimeError, match=r"setup_context|^linear_token_logprobs: has no gradient under"
        ):
            transform(lambda x: function(x, torch.arange(4)))(torch.eye(4))
