"""hybrid_embedding and its gradients; CUDA's are in test_simt_embeddings.py."""

import pytest
import torch
from cases import DTYPES
from tolerances import ROUNDING, assert_close
from triton_device import triton

import dmax_kernels
import dmax_kernels.triton.embedding
from dmax_kernels import reference

BACKENDS = {"reference": reference, "cpu": dmax_kernels, "triton": triton}
# The interpreter warns of 0 * inf
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
everywhere = pytest.mark.parametrize("backend", BACKENDS)
MASK = 4


def rounding_of(backend, dtype):
    """Half a unit in the last place; a whole one for Triton, whose interpreter truncates."""
    return 2 * ROUNDING[dtype] if backend == "triton" else ROUNDING[dtype]


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


# D: scalar tail only, one vector and a tail, the real size; k: absent, 1, several, the most. For
# Triton one element, a cut chunk, one whole chunk, several chunks with a cut one
@pytest.mark.parametrize(
    ("backend", "dim", "dtype", "k"),
    [
        (b, dim, dtype, k)
        for b in ("reference", "cpu")
        for dim in (3, 17, 2048)
        for dtype in DTYPES
        for k in (None, 1, 3, 8)
    ]
    + [
        ("triton", dim, dtype, k)
        for dim, dtype in zip((1, 7, 1024, 1500), (*DTYPES, torch.float32), strict=True)
        for k in (None, 1, 3)
    ],
)
def test_values(backend, dim, dtype, k):
    shape = (2, 6) if backend == "triton" else (3, 32)
    embedding, token, confidence, masked = inputs(dtype, dim, k, shape)
    confidence.view(-1)[0] = torch.nan
    hybrid = BACKENDS[backend].hybrid_embedding(embedding, token, confidence, masked, MASK)
    assert hybrid.dtype == dtype
    expected = in_float64(embedding, token, confidence, masked)
    assert_close(hybrid, expected, rounding_of(backend, dtype), 1e-6)


@everywhere
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact_ends(backend, dtype):
    """p = 1 is the token's row and a masked position the mask's, to the bit; p = 0 is e(mask)."""
    op, rounding = BACKENDS[backend].hybrid_embedding, rounding_of(backend, dtype)
    embedding, token, _, _ = inputs(dtype, 100, None, (2, 6))
    never = torch.zeros(token.shape, dtype=torch.bool)
    ones = torch.ones(token.shape)
    assert torch.equal(op(embedding, token, ones, never, MASK), embedding[token])
    e_mask = embedding[MASK].expand(*token.shape, 100)
    assert torch.equal(op(embedding, token, ones, ~never, MASK), e_mask)
    assert_close(op(embedding, token, 0 * ones, never, MASK), e_mask, rounding)
    above_one = torch.nextafter(ones, 2 * ones)  # a probability above 1 by rounding
    assert_close(op(embedding, token, above_one, never, MASK), embedding[token], rounding)


@everywhere
def test_infinite_mask_embedding_where_masked(backend):
    embedding, token, _, _ = inputs(torch.bfloat16, 100, None, (2, 6))
    embedding[MASK] = torch.inf
    masked = torch.ones_like(token, dtype=torch.bool)
    hybrid = BACKENDS[backend].hybrid_embedding(embedding, token, torch.ones(2, 6), masked, MASK)
    assert (hybrid == torch.inf).all()


@everywhere
def test_degenerate_rows(backend):
    op = BACKENDS[backend].hybrid_embedding
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


def test_unknown_token_gives_a_nan_row_on_triton():
    """Where the CPU raises an error, the GPU cannot; nothing outside the table is read."""
    embedding, token, confidence, masked = inputs(torch.float32, 8, None, (2, 6))
    masked[:] = False
    token[0, 0], token[1, 2] = len(embedding), -1
    hybrid = triton.hybrid_embedding(embedding, token, confidence, masked, MASK)
    nan_rows = hybrid.isnan().all(-1)
    assert nan_rows.nonzero().tolist() == [[0, 0], [1, 2]]
    assert hybrid[~nan_rows].isfinite().all()


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


# Spans of 5 positions: more than one partial sum of the mask embedding, the last of them cut
@pytest.mark.parametrize(
    ("dim", "dtype", "k"), [(7, torch.float32, None), (1500, torch.bfloat16, 2)]
)
def test_gradients_of_triton(monkeypatch, dim, dtype, k):
    monkeypatch.setattr(dmax_kernels.triton.embedding, "MASK_SPAN", 5)
    embedding, token, confidence, masked = inputs(dtype, dim, k, (2, 6), vocab_size=9)
    grad_output = torch.randn(2, 6, dim, generator=torch.manual_seed(1)).to(dtype)
    arguments = (grad_output, embedding, token, confidence, masked, MASK)
    grads = triton.hybrid_embedding_backward(*arguments)
    wide = [t.double().requires_grad_() for t in (embedding, confidence)]
    in_float64(wide[0], token, wide[1], masked).backward(grad_output.double())
    for grad, leaf, rounding in zip(grads, wide, (rounding_of("triton", dtype), 1e-5), strict=True):
        assert_close(grad, leaf.grad, rounding, 1e-5 * leaf.grad.abs().max().item())
    again = triton.hybrid_embedding_backward(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(grads, again, strict=True))


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
    for functions in BACKENDS.values():
        nothing = functions.hybrid_embedding(embedding, token[:0], confidence[:0], masked[:0], MASK)
        assert nothing.shape == (0, 32, 24)
    arguments = (nothing, embedding, token[:0], confidence[:0], masked[:0], MASK)
    for op in (torch.ops.dmax.hybrid_embedding_backward, triton.hybrid_embedding_backward):
        grad_embedding, grad_confidence = op(*arguments)
        assert (grad_embedding == 0).all()
        assert grad_confidence.shape == (0, 32)


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
