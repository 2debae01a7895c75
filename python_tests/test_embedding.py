"""hybrid_embedding and its gradients on the CPU."""

import pytest
import torch
from cases import DTYPES
from tolerances import ROUNDING, assert_close

import dmax_kernels
from dmax_kernels import reference

OPS = (reference.hybrid_embedding, dmax_kernels.hybrid_embedding)
MASK = 4


def in_float64(embedding, token, confidence, masked):
    """Eqs. 8-10 in float64; differentiable."""
    if token.dim() == masked.dim():
        token, confidence = token.unsqueeze(-1), confidence.unsqueeze(-1)
    e = embedding.double()
    p = confidence.double()
    residual = (1 - p.sum(-1)).clamp(min=0)
    mix = (p.unsqueeze(-1) * e[token]).sum(-2) + residual.unsqueeze(-1) * e[MASK]
    target = (p * e[token].norm(dim=-1)).sum(-1) + residual * e[MASK].norm()
    hybrid = mix / mix.norm(dim=-1, keepdim=True) * target.unsqueeze(-1)
    return torch.where(masked.unsqueeze(-1), e[MASK], hybrid)


def inputs(dtype, dim, k, shape=(3, 32), vocab_size=50):
    generator = torch.manual_seed(dim + (k or 0))
    embedding = torch.randn(vocab_size, dim, generator=generator).to(dtype)
    ids = shape if k is None else (*shape, k)
    token = torch.randint(0, vocab_size, ids, generator=generator)
    confidence = torch.rand(ids, generator=generator) / (k or 1)
    masked = torch.rand(shape, generator=generator) < 0.3
    return embedding, token, confidence, masked


# D: scalar tail only, one vector and a tail, the real size; k: absent, 1, several, the most
@pytest.mark.parametrize("op", OPS, ids=("reference", "cpu"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [3, 17, 2048])
@pytest.mark.parametrize("k", [None, 1, 3, 8])
def test_values(op, dtype, dim, k):
    embedding, token, confidence, masked = inputs(dtype, dim, k)
    hybrid = op(embedding, token, confidence, masked, MASK)
    assert hybrid.dtype == dtype
    assert_close(hybrid, in_float64(embedding, token, confidence, masked), ROUNDING[dtype], 1e-6)


@pytest.mark.parametrize("op", OPS, ids=("reference", "cpu"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact_ends(op, dtype):
    """p = 1 is the token's row and a masked position the mask's, to the bit; p = 0 is e(mask)."""
    embedding, token, _, _ = inputs(dtype, 100, None)
    never = torch.zeros(token.shape, dtype=torch.bool)
    ones = torch.ones(token.shape)
    assert torch.equal(op(embedding, token, ones, never, MASK), embedding[token])
    e_mask = embedding[MASK].expand(*token.shape, 100)
    assert torch.equal(op(embedding, token, ones, ~never, MASK), e_mask)
    assert_close(op(embedding, token, 0 * ones, never, MASK), e_mask, ROUNDING[dtype])
    above_one = torch.nextafter(ones, 2 * ones)  # a probability above 1 by rounding
    assert_close(op(embedding, token, above_one, never, MASK), embedding[token], ROUNDING[dtype])


@pytest.mark.parametrize("op", OPS, ids=("reference", "cpu"))
def test_degenerate_rows(op):
    embedding = torch.tensor([[0.0, 0.0], [3.0, 4.0], [-3.0, -4.0], [1.0, 0.0]])
    token = torch.tensor([0, 2, 1, 3, 1])
    confidence = torch.tensor([0.7, 0.5, 0.25, float("nan"), 0.5])
    masked = torch.zeros(5, dtype=torch.bool)
    hybrid = op(embedding, token, confidence, masked, 1)
    assert_close(hybrid[0], torch.tensor([0.3 * 3, 0.3 * 4]), 1e-6)  # zero norm beside e(mask)
    assert hybrid[1].tolist() == [0, 0]  # opposite embeddings cancel: no direction is left
    assert hybrid[2].tolist() == [3, 4]  # the token is the mask token
    assert hybrid[3].isnan().all()
    assert op(embedding * 0, token[:3], confidence[:3], masked[:3], 1).abs().sum() == 0


# Same grid as the values, gradients against float64 autograd
@pytest.mark.parametrize("dim", [3, 17, 300])
@pytest.mark.parametrize("k", [None, 1, 3])
def test_gradients(dim, k):
    embedding, token, confidence, masked = inputs(torch.float32, dim, k)
    token[0, :4] = MASK  # a predicted mask token shares the mask's row
    leaves = [t.clone().requires_grad_() for t in (embedding, confidence)]
    hybrid = dmax_kernels.hybrid_embedding(leaves[0], token, leaves[1], masked, MASK)
    grad_output = torch.randn(hybrid.shape, generator=torch.manual_seed(5))
    hybrid.backward(grad_output)

    wide = [t.double().requires_grad_() for t in (embedding, confidence)]
    in_float64(wide[0], token, wide[1], masked).backward(grad_output.double())
    scale = wide[0].grad.abs().max().item()
    assert_close(leaves[0].grad, wide[0].grad, 1e-5, 2e-6 * scale)
    assert_close(leaves[1].grad, wide[1].grad, 1e-5, 1e-5 * wide[1].grad.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_round_once(dtype):
    """The table's gradient is summed in float32: its error does not grow with the positions."""
    embedding, token, confidence, masked = inputs(dtype, 64, None, shape=(4096,), vocab_size=8)
    leaf = embedding.clone().requires_grad_()
    grad_output = torch.randn(4096, 64, generator=torch.manual_seed(6)).to(dtype)
    dmax_kernels.hybrid_embedding(leaf, token, confidence, masked, MASK).backward(grad_output)
    wide = embedding.double().requires_grad_()
    in_float64(wide, token, confidence, masked).backward(grad_output.double())
    scale = wide.grad.abs().max().item()
    assert_close(leaf.grad, wide.grad, ROUNDING[dtype], 2e-5 * scale)


def test_gradients_repeat_to_the_bit():
    embedding, token, confidence, masked = inputs(torch.float32, 200, 3, shape=(16, 32))
    grad_output = torch.randn(16, 32, 200)
    runs = []
    for num_threads in (1, 2, 4, 4):
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(num_threads)
            runs.append(
                torch.ops.dmax.hybrid_embedding_backward(
                    grad_output, embedding, token, confidence, masked, MASK
                )
            )
        finally:
            torch.set_num_threads(threads)
    for grad_embedding, grad_confidence in runs[1:]:
        assert torch.equal(grad_embedding, runs[0][0])
        assert torch.equal(grad_confidence, runs[0][1])


def test_gradient_of_some_inputs():
    embedding, token, confidence, masked = inputs(torch.float32, 20, None)
    leaf = confidence.clone().requires_grad_()
    dmax_kernels.hybrid_embedding(embedding, token, leaf, masked, MASK).sum().backward()
    assert leaf.grad.isfinite().all()
    assert (leaf.grad[masked] == 0).all()
    output = dmax_kernels.hybrid_embedding(embedding, token, leaf, masked, MASK)
    (grad,) = torch.autograd.grad(output.sum() * 0, leaf)  # grad_output 0, and expanded
    assert (grad == 0).all()
    first = torch.autograd.grad(
        dmax_kernels.hybrid_embedding(embedding, token, leaf, masked, MASK).sum(),
        leaf,
        create_graph=True,
    )
    with pytest.raises(RuntimeError, match="second derivatives are not there"):
        first[0].sum().backward()


def test_strides_and_shapes():
    embedding, token, confidence, masked = inputs(torch.float32, 24, None)
    expected = dmax_kernels.hybrid_embedding(embedding, token, confidence, masked, MASK)
    padded = torch.zeros(50, 31)[:, :24].copy_(embedding)
    transposed = embedding.t().contiguous().t()
    for table in (padded, transposed):
        actual = dmax_kernels.hybrid_embedding(
            table, token.t().contiguous().t().int(), confidence.t().contiguous().t(), masked, MASK
        )
        assert torch.equal(actual, expected)
    empty = dmax_kernels.hybrid_embedding(embedding, token[:0], confidence[:0], masked[:0], MASK)
    assert empty.shape == (0, 32, 24)


E_, T_, C_, M_ = torch.ones(6, 4), torch.zeros(3).long(), torch.ones(3), torch.zeros(3).bool()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(6), T_, C_, M_, 0), r"embedding must be \[V, D\] .*, got \[6\]"),
        ((E_.double(), T_, C_, M_, 0), "embedding must be float32.*, got float64"),
        ((E_, T_.float(), C_, M_, 0), "token must be int64 or int32, got float32"),
        ((E_, T_, C_.half(), M_, 0), "confidence must be float32, got float16"),
        ((E_, T_, C_, M_.long(), 0), "masked must be bool, got int64"),
        ((E_, torch.zeros(2).long(), C_, M_, 0), r"token must have shape \[3\] .*, got \[2\]"),
        ((E_, T_, torch.ones(2), M_, 0), r"confidence must have shape \[3\] .*, got \[2\]"),
        (
            (E_, torch.zeros(3, 9).long(), torch.ones(3, 9), M_, 0),
            r"token must hold 1\.\.8.* got 9",
        ),
        ((E_, T_, C_, M_, 6), r"mask_token_id must be a token id in \[0, 6\), got 6"),
        ((E_, T_, C_, M_, -1), r"mask_token_id must be a token id in \[0, 6\), got -1"),
        ((E_, T_ + 6, C_, M_, 0), r"token must be an id in \[0, 6\) .*, got 6 at position 0"),
        ((E_, T_ - 1, C_, M_, 0), r"token must be an id in \[0, 6\) .*, got -1 at position 0"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(RuntimeError, match="^hybrid_embedding: " + message):
        dmax_kernels.hybrid_embedding(*arguments)


def test_token_of_a_masked_position_is_not_read():
    token = torch.tensor([999, 1, -5])
    masked = torch.tensor([True, False, True])
    assert dmax_kernels.hybrid_embedding(E_, token, C_, masked, 0).shape == (3, 4)
