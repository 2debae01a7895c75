"""linear_token_logprobs: what token_logprobs says of the product, and its gradients."""

import pytest
import torch
from masks import packed, random_mask
from tolerances import assert_close
from triton_device import DEVICE, triton_op

import dmax_kernels
from dmax_kernels import TokenLogprobs, reference

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's inf - inf


def triton(hidden, weight, ids, bias=None, **options):
    return TokenLogprobs(
        *triton_op("linear_token_logprobs", hidden, weight, ids, bias, **options)[:4]
    )


OPS = {
    "reference": reference.linear_token_logprobs,
    "cpu": dmax_kernels.linear_token_logprobs,
    "triton": triton,
}
everywhere = pytest.mark.parametrize("backend", OPS)
# Triton's interpreter multiplies the bits of bfloat16 as integers: float16 stands in for it there
DTYPES = (torch.float32, torch.float16) if DEVICE.type == "cpu" else (torch.float32, torch.bfloat16)


def held_inputs(rows, vocab_size, dim, dtype=torch.float32):
    """Small integers: every product and sum is exact in float32, with many ties."""
    generator = torch.manual_seed(rows + vocab_size)

    def integers(*shape):
        return torch.randint(-3, 4, shape, generator=generator).to(dtype)

    return integers(rows, dim), integers(vocab_size, dim), integers(vocab_size)


def assert_same(actual, expected):
    assert torch.equal(actual.rank, expected.rank)
    assert torch.equal(actual.top_ids, expected.top_ids)
    assert_close(actual.logprob, expected.logprob, 2e-6, 2e-6)
    assert_close(actual.top_logprobs, expected.top_logprobs, 2e-6, 2e-6)


# One row; more rows than Triton stores at a time; tokens of several blocks of the CPU's product
@everywhere
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "vocab_size", "dim"), [(1, 1, 1), (3, 1300, 40), (67, 130, 33)])
def test_as_token_logprobs_of_the_product(backend, dtype, rows, vocab_size, dim):
    hidden, weight, bias = held_inputs(rows, vocab_size, dim, dtype)
    generator = torch.manual_seed(1)
    allowed, _ = random_mask(rows, vocab_size)
    for per_row, options in (
        (1, {}),
        (3, {"top_n": min(5, vocab_size), "temperature": 5.0}),
        (1, {"top_n": min(5, vocab_size), "allowed": allowed}),
        (1, {"allowed": allowed[:1]}),
    ):
        ids = torch.randint(0, vocab_size, (rows, per_row), generator=generator)
        ids[0, 0] = -100
        ids = ids if per_row > 1 else ids.squeeze(1)
        for own_bias in (None, bias):
            logits = hidden.float() @ weight.float().t()
            logits = logits if own_bias is None else logits + own_bias.float()
            expected = dmax_kernels.token_logprobs(logits, ids, **options)
            assert_same(OPS[backend](hidden, weight, ids, own_bias, **options), expected)


def test_more_rows_than_the_cpu_stores_at_a_time():
    """64 MB hold the logits of 55 rows of 300,000 tokens."""
    hidden, weight, _ = held_inputs(57, 300_000, 2)
    ids = torch.arange(57) * 5000
    actual = dmax_kernels.linear_token_logprobs(hidden, weight, ids)
    expected = dmax_kernels.token_logprobs(hidden @ weight.t(), ids)
    assert_same(actual, expected)


@pytest.mark.parametrize("op", [OPS["cpu"], OPS["reference"]], ids=["cpu", "reference"])
def test_suppressed_tokens_padded_heads_and_leading_dimensions(op):
    hidden, weight, bias = held_inputs(6, 330, 24)
    ids = torch.arange(6).view(2, 3) * 40
    options = {"suppress_tokens": (80,), "vocab_limit": 300, "top_n": 2}
    actual = op(hidden.view(2, 3, 24), weight, ids, bias, **options)
    logits = (hidden @ weight.t() + bias)[:, :300].view(2, 3, 300)
    expected = dmax_kernels.token_logprobs(logits, ids, suppress_tokens=(80,), top_n=2)
    assert_same(actual, expected)
    assert actual.logprob[0, 2] == -torch.inf


# ---- Gradients


def gradients(logprob, inputs):
    generator = torch.manual_seed(3)
    upstream = torch.randn(logprob.shape, generator=generator)
    return torch.autograd.grad((logprob * upstream).sum(), inputs)


@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_against_float64(dtype, with_mask):
    """Two blocks of columns; an ignored row and, with a mask, a hidden id have no gradient."""
    rows, vocab_size, dim = 9, 4500, 12
    generator = torch.manual_seed(2)
    hidden = torch.randn(rows, dim, generator=generator).to(dtype)
    weight = torch.randn(vocab_size, dim, generator=generator).to(dtype)
    bias = torch.randn(vocab_size, generator=generator).to(dtype)
    ids = torch.randint(0, vocab_size, (rows,), generator=generator)
    ids[4] = -100
    options, bits = {"temperature": 0.7}, torch.ones(rows, vocab_size, dtype=torch.bool)
    if with_mask:
        bits = torch.rand(rows, vocab_size, generator=generator) < 0.5
        bits[torch.arange(rows), ids.clamp(min=0)] = True
        options["allowed"] = packed(bits)
    inputs = [each.clone().requires_grad_() for each in (hidden, weight, bias)]
    logprob = dmax_kernels.linear_token_logprobs(*inputs[:2], ids, inputs[2], **options).logprob
    actual = gradients(logprob, inputs)
    exact = [each.double().requires_grad_() for each in (hidden, weight, bias)]
    logits = (exact[0] @ exact[1].t() + exact[2]).masked_fill(~bits, -torch.inf)
    of_ids = torch.log_softmax(logits / 0.7, dim=-1).gather(-1, ids.clamp(min=0).unsqueeze(-1))
    expected = gradients(of_ids.squeeze(-1).masked_fill(ids < 0, 0), exact)
    for mine, theirs in zip(actual, expected, strict=True):
        assert mine.dtype == dtype
        bound = (1e-5 if dtype == torch.float32 else 2e-2) * theirs.abs().max().item()
        assert_close(mine.float(), theirs.float(), 0, bound)
    assert (actual[0][4] == 0).all()


def test_a_hidden_id_has_no_gradient():
    hidden, weight, _ = held_inputs(2, 40, 5)
    bits = torch.ones(40, dtype=torch.bool)
    bits[7] = False
    weight.requires_grad_()
    found = dmax_kernels.linear_token_logprobs(
        hidden, weight, torch.tensor([7, 3]), allowed=packed(bits)
    )
    assert found.logprob[0] == -torch.inf
    for row in range(2):  # of the hidden id only the normaliser has a gradient, and not at itself
        (gradient,) = torch.autograd.grad(found.logprob[row], weight, retain_graph=True)
        assert (gradient[7] == 0).all()
        assert gradient.abs().sum() > 0
        shown = (hidden[row] @ weight.detach().t()).masked_fill(~bits, -torch.inf)
        p = shown.softmax(dim=-1)
        onehot = torch.zeros(40)
        onehot[3] = row
        assert_close(gradient, torch.outer(onehot - p, hidden[row]), 1e-5, 1e-6)


def test_no_gradient_of_several_ids():
    hidden, weight, _ = held_inputs(2, 40, 5)
    hidden.requires_grad_()
    several = dmax_kernels.linear_token_logprobs(hidden, weight, torch.zeros(2, 3).long())
    with pytest.raises(RuntimeError, match="has a gradient for one id per row only"):
        several.logprob.sum().backward()


def test_no_rows():
    hidden, weight, _ = held_inputs(2, 40, 5)
    found = dmax_kernels.linear_token_logprobs(hidden[:0], weight, torch.zeros(0).long(), top_n=3)
    assert [tuple(each.shape) for each in found] == [(0,), (0,), (0, 3), (0, 3)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": torch.zeros(3).long()}, r"ids must have shape \[2\] \(one token per row"),
        ({"ids": torch.zeros(2)}, "ids must be int64 or int32, got float32"),
        ({"ids": torch.tensor([1, 40])}, r"ids must be -100 .* in \[0, 40\), got 40 at position 1"),
        ({"top_n": 21}, r"top_n must be in 0\.\.20"),
        ({"temperature": 0.0}, "temperature must be at least 1e-30"),
        ({"allowed": torch.ones(2, 3).int()}, r"allowed must have shape \[2, 2\]"),
        ({"weight": torch.ones(40, 6)}, r"hidden must be \[\.\.\., D\] with D = 6"),
    ],
    ids=str,
)
def test_errors(changes, message):
    hidden, weight, _ = held_inputs(2, 40, 5)
    arguments = {"hidden": hidden, "weight": weight, "ids": torch.tensor([1, 2]), **changes}
    with pytest.raises(RuntimeError, match=f"^linear_token_logprobs: {message}"):
        dmax_kernels.linear_token_logprobs(**arguments)
