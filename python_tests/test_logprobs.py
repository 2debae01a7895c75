"""token_logprobs on every backend: the reference and the CPU here, CUDA's source on the host
(csrc/simt) and Triton under its interpreter. All are compared with float64.
"""

import pytest
import simt_ops
import torch
from cases import DTYPES, LARGE_VOCABS, SMALL_VOCABS, logit_rows, stacked_rows, strided_copies
from masks import packed
from simt_ops import CHOSEN, H200, ONE_MULTIPROCESSOR
from tolerances import ROUNDING, assert_close
from triton_device import triton_op

import dmax_kernels
from dmax_kernels import TokenLogprobs, reference


def triton(logits, ids, **options):
    return TokenLogprobs(*triton_op("token_logprobs", logits, ids, **options)[:4])


OPS = {
    "reference": reference.token_logprobs,
    "cpu": dmax_kernels.token_logprobs,
    "cuda": simt_ops.token_logprobs,
    "triton": triton,
}
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's inf - inf


def in_float64(logits, ids, temperature=1.0, top_n=0):
    """By a sort of Python's, row by row: NaN first, then the larger value, then the lower id."""
    columns = ids if ids.dim() == logits.dim() else ids.unsqueeze(-1)
    logprobs = torch.log_softmax(logits.double() / temperature, dim=-1)
    ranks, tops = [], []
    for row, wanted in zip(logits.double().tolist(), columns.tolist(), strict=True):
        order = sorted(range(len(row)), key=lambda v: (row[v] == row[v], -row[v], v))
        place = {v: i for i, v in enumerate(order)}
        ranks.append([place[v] for v in wanted])
        tops.append(order[:top_n])
    top_ids = torch.tensor(tops, dtype=torch.int64).reshape(len(logits), top_n)
    rank = torch.tensor(ranks).reshape(ids.shape)
    logprob = logprobs.gather(-1, columns).reshape(ids.shape)
    return TokenLogprobs(logprob, rank, top_ids, logprobs.gather(-1, top_ids))


def assert_right(name, logits, ids, temperature=1.0, top_n=0):
    actual = OPS[name](logits, ids, temperature=temperature, top_n=top_n)
    expected = in_float64(logits, ids, temperature, top_n)
    assert torch.equal(actual.rank, expected.rank)
    assert torch.equal(actual.top_ids, expected.top_ids)
    # Float32 holds the difference of two logits and the logarithm of the sum. The reference
    # subtracts the logsumexp of logits of up to 65504 instead.
    tolerance = 1e-6 if name != "reference" else 1e-6 + 65504 * 2.0**-23 / min(temperature, 1.0)
    assert_close(actual.logprob, expected.logprob, 1e-6, tolerance)
    assert_close(actual.top_logprobs, expected.top_logprobs, 1e-6, tolerance)
    return actual


def some_ids(logits, per_row, seed=0):
    generator = torch.manual_seed(seed)
    return torch.randint(0, logits.shape[-1], (len(logits), per_row), generator=generator)


# Every edge case in every dtype at every small V. Triton's interpreter is slow: one token, one V
# within a tile, and two tiles, the second cut, each in a different dtype
@pytest.mark.parametrize(
    ("name", "vocab_size", "dtype"),
    [(n, v, d) for n in ("reference", "cpu", "cuda") for v in SMALL_VOCABS for d in DTYPES]
    + [("triton", v, d) for v, d in zip((1, 127, 5000), DTYPES, strict=True)],
)
def test_edge_cases(name, vocab_size, dtype):
    names, logits = stacked_rows(vocab_size, dtype)
    if name == "triton":
        some = [i for i, each in enumerate(names) if each.startswith(("n", "tie", "inf", "all"))]
        logits = logits[some]
    ids = some_ids(logits, 3)
    # Ids on which the cases turn: one of the equals, a NaN's, an infinity's, the last
    ids = torch.cat([ids, torch.tensor([[4, 6, 70, 2047, 2048, -1]]).expand(len(ids), -1)], -1)
    assert_right(name, logits, ids % vocab_size, top_n=min(3, vocab_size))


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("temperature", [0.3, 5.0])
def test_temperature_and_one_id_per_row(name, temperature):
    logits = torch.stack([logit_rows(5000)[each] for each in ("normal", "peaked", "nans")])
    ids = some_ids(logits, 1).squeeze(-1)
    actual = assert_right(name, logits, ids, temperature=temperature)
    assert [each.shape for each in actual] == [(3,), (3,), (3, 0), (3, 0)]
    assert [each.dtype for each in actual] == [
        torch.float32, torch.int64, torch.int64, torch.float32,
    ]  # fmt: skip


@pytest.mark.parametrize("name", OPS)
def test_longest_lists(name):
    """All equal: the lowest ids, across tiles."""
    logits = torch.zeros(1, 4100)
    logits[0, 4097] = 1.0
    ids = torch.tensor([[4097, 0, 4098]])
    actual = assert_right(name, logits, ids, top_n=20)
    assert actual.top_ids.tolist() == [[4097, *range(19)]]
    assert actual.rank.tolist() == [[0, 1, 4098]]


@pytest.mark.parametrize("name", OPS)
def test_the_best_lie_side_by_side(name):
    """A few threads of a GPU hold all of the best, and each tile is better than the one before."""
    logits = torch.arange(4100.0).view(1, -1) / 64
    actual = assert_right(name, logits, torch.tensor([[4099, 4090]]), top_n=20)
    assert actual.top_ids.tolist() == [list(range(4099, 4079, -1))]
    assert actual.rank.tolist() == [[0, 9]]


# The real vocabulary, aligned and odd: on the CPU three rows may share threads, eight do not
@pytest.mark.parametrize("num_rows", [1, 3, 8])
@pytest.mark.parametrize("vocab_size", LARGE_VOCABS)
def test_large_vocabulary(num_rows, vocab_size):
    logits = 3 * torch.randn(num_rows, vocab_size, generator=torch.manual_seed(1))
    assert_right("cpu", logits, some_ids(logits, 2), top_n=20)
    for name in ("cuda", "triton") if num_rows == 1 else ():
        assert_right(name, logits.bfloat16(), some_ids(logits, 2), top_n=20)


# Rows whose tiles lie in several blocks, and in one
@pytest.mark.parametrize(("gpu", "splits"), [(H200, 2), (ONE_MULTIPROCESSOR, 1)])
def test_split_rows_of_cuda(gpu, splits):
    _, logits = stacked_rows(9 * 2048 + 3, torch.bfloat16)
    ids = some_ids(logits, 2)
    actual = simt_ops.token_logprobs(logits, ids, top_n=4, gpu=gpu)
    assert CHOSEN[-1].splits == splits
    expected = in_float64(logits, ids, top_n=4)
    assert torch.equal(actual.rank, expected.rank)
    assert torch.equal(actual.top_ids, expected.top_ids)
    assert_close(actual.logprob, expected.logprob, 1e-6, 1e-6)


@pytest.mark.parametrize(("order", "seed", "resident"), [("reversed", 0, 1), ("random", 1, 4)])
def test_cuda_in_any_order(order, seed, resident):
    logits = torch.stack([logit_rows(9 * 2048 + 3)[n] for n in ("normal", "nans")]).bfloat16()
    ids = some_ids(logits, 2)
    expected = simt_ops.token_logprobs(logits, ids, top_n=3)
    with simt_ops.order(order, seed, resident):
        actual = simt_ops.token_logprobs(logits, ids, top_n=3)
    assert CHOSEN[-1].splits > 1
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a.nan_to_num(-1), b.nan_to_num(-1))


@pytest.mark.parametrize("name", ["cpu", "cuda", "triton"])
def test_strides_and_int32(name):
    logits = 3 * torch.randn(3, 300, generator=torch.manual_seed(3))
    ids = some_ids(logits, 2)
    expected = OPS[name](logits, ids, top_n=2)
    for copy in strided_copies(logits).values():
        actual = OPS[name](copy, ids.int().t().contiguous().t(), top_n=2)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("name", OPS)
def test_ignored_places(name):
    logits = torch.randn(2, 50, generator=torch.manual_seed(5))
    logits[1, 7] = torch.nan
    ids = torch.tensor([[-100, 3], [-100, 4]])
    actual = OPS[name](logits, ids)
    assert actual.logprob[:, 0].tolist() == [0, 0]
    assert actual.rank[:, 0].tolist() == [-1, -1]
    assert actual.logprob.isnan().tolist() == [[False, False], [False, True]]
    other = OPS[name](logits, ids.masked_fill(ids == -100, 5), ignore_index=5)
    assert torch.equal(other.rank, actual.rank)


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_gpus_give_nan_for_an_id_out_of_range(name):
    logits = torch.randn(2, 50, generator=torch.manual_seed(5))
    actual = OPS[name](logits, torch.tensor([[50, 3], [-1, 4]]))
    assert actual.logprob.isnan().tolist() == [[True, False], [True, False]]
    assert actual.rank[:, 0].tolist() == [-1, -1]


def test_empty():
    actual = dmax_kernels.token_logprobs(torch.empty(0, 9), torch.empty(0, 2).long(), top_n=2)
    assert [each.shape for each in actual] == [(0, 2), (0, 2), (0, 2), (0, 2)]


# Unshared and shared rows, one thread and two: the same bits
def test_cpu_bits_depend_on_the_row_alone():
    logits = 3 * torch.randn(7, 157_184, generator=torch.manual_seed(6))
    ids = some_ids(logits, 1)
    together = dmax_kernels.token_logprobs(logits, ids, top_n=3)
    alone = dmax_kernels.token_logprobs(logits[2:3], ids[2:3], top_n=3)
    assert all(torch.equal(a, b[2:3]) for a, b in zip(alone, together, strict=True))


def gradient(logits, ids, upstream, temperature):
    """In float64: upstream (onehot - softmax) / temperature, 0 where the id is ignored."""
    keep = ids != -100
    onehot = torch.zeros(logits.shape, dtype=torch.float64)
    onehot.scatter_(-1, torch.where(keep, ids, 0).unsqueeze(-1), 1.0)
    softmax = torch.softmax(logits.double() / temperature, dim=-1)
    grad = upstream.double().unsqueeze(-1) * (onehot - softmax) / temperature
    return grad * keep.unsqueeze(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 4.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["reference", "cpu", "cuda", "triton"])
def test_gradient(name, dtype, temperature):
    generator = torch.manual_seed(7)
    logits = (3 * torch.randn(4, 300, generator=generator)).to(dtype)
    logits[1, 9] = 50.0  # a sure row: the gradient at its token is next to 0
    ids, upstream = torch.tensor([5, 9, -100, 299]), torch.randn(4, generator=generator)
    if name in ("reference", "cpu"):
        leaf = logits.clone().requires_grad_()
        results = OPS[name](leaf, ids, temperature=temperature, top_n=2)
        assert not results.rank.requires_grad
        assert not results.top_logprobs.requires_grad
        (actual,) = torch.autograd.grad(results.logprob, leaf, upstream)
    else:
        backward, forward = {
            "cuda": (simt_ops.oput_loss_backward, simt_ops.token_logprobs_with_logsumexp),
            "triton": (
                lambda *arguments, **options: triton_op(
                    "oput_loss_backward", *arguments, **options
                ),
                lambda *arguments, **options: triton_op("token_logprobs", *arguments, **options),
            ),
        }[name]
        logsumexp = forward(logits, ids, temperature=temperature)[4]
        actual = backward(-upstream, logits, ids, logsumexp, temperature=temperature)
    assert actual.dtype == dtype
    expected = gradient(logits, ids, upstream, temperature)
    # Half a unit in the last place of the float32 logsumexp, up to 64 in the sure row (128 / 0.7)
    assert_close(actual, expected, 2 * ROUNDING[dtype], 8e-6 / temperature)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_several_ids(dtype):
    """Some equal, some ignored, a row without any, the first token, int32; opposite upstreams."""
    generator = torch.manual_seed(7)
    logits = (3 * torch.randn(5, 300, generator=generator)).to(dtype)
    logits[1, 9] = 50.0
    ids = torch.tensor(
        [[5, 0, 5, 7], [9, 9, 9, -100], [-100] * 4, [-100, 299, -100, 1], [3, 4, 5, 6]]
    )
    upstream = torch.randn(5, 4, generator=generator)
    upstream[4] = torch.tensor([1.0, -1.0, 2.0, -2.0])  # their sum is 0
    upstream[2, 0] = torch.nan  # of an ignored place
    for temperature in (1.0, 0.7):
        leaf = logits.clone().requires_grad_()
        results = dmax_kernels.token_logprobs(leaf, ids.int(), temperature=temperature)
        (actual,) = torch.autograd.grad(results.logprob, leaf, upstream)
        assert actual.dtype == dtype
        expected = sum(
            gradient(logits, ids[:, i], upstream[:, i].nan_to_num(0.0), temperature)
            for i in range(4)
        )
        assert_close(actual, expected, 2 * ROUNDING[dtype], 2e-5 / temperature)
        one = logits.clone().requires_grad_()
        single = dmax_kernels.token_logprobs(one, ids[:, 1], temperature=temperature).logprob
        leaf = logits.clone().requires_grad_()
        column = dmax_kernels.token_logprobs(leaf, ids[:, 1:2], temperature=temperature).logprob
        single.backward(upstream[:, 1])
        column.backward(upstream[:, 1:2])
        assert_close(leaf.grad, one.grad, ROUNDING[dtype], 8e-6 / temperature)


@pytest.mark.parametrize("one_mask", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_gradient_of_several_ids_with_a_mask(name, dtype, one_mask):
    """Hidden tokens have no gradient, whatever their logits are; the log-probability of a hidden id
    has only the normaliser's. A row in which nothing is allowed has none.
    """
    generator = torch.manual_seed(9)
    logits = (3 * torch.randn(6, 300, generator=generator)).to(dtype)
    bits = torch.rand(1 if one_mask else 6, 300, generator=generator) < 0.5
    bits[0, :9] = torch.tensor([False, True, False, True, False, True, False, True, True])
    if not one_mask:
        bits[1, 0], bits[2, 0], bits[4] = True, False, False
    allowed, bits = packed(bits), bits.expand(6, 300)
    hidden = (~bits[0]).nonzero().squeeze(-1)
    logits[0, hidden[:3]] = torch.tensor([torch.nan, torch.inf, 90.0], dtype=dtype)
    ids = torch.randint(0, 300, (6, 5), generator=generator)
    ids[0] = torch.tensor([0, 3, 3, 2, 7])  # a hidden NaN, equal ids, a hidden infinity
    ids[1, :2], ids[2, 1], ids[3] = -100, 0, -100
    ids[5] = hidden[5:10] if one_mask else (~bits[5]).nonzero()[:5].squeeze(-1)  # hidden ones alone
    upstream = torch.randn(6, 5, generator=generator)
    leaf = logits.clone().requires_grad_()
    found = OPS[name](leaf.view(2, 3, 300), ids.view(2, 3, 5), temperature=0.7,
                      allowed=allowed if one_mask else allowed.view(2, 3, -1))  # fmt: skip
    (actual,) = torch.autograd.grad(found.logprob, leaf, upstream.view(2, 3, 5))
    visible = logits.double().masked_fill(~bits, -torch.inf)
    used = ids != -100
    logprob = torch.log_softmax(visible / 0.7, dim=-1).gather(-1, ids.clamp(min=0))
    assert_close(found.logprob.view(6, 5), torch.where(used, logprob, 0.0), 1e-6, 4e-6)
    expected = sum(gradient(visible, ids[:, i], upstream[:, i], 0.7) for i in range(5))
    expected = expected.masked_fill(~bits | ~used.any(dim=-1, keepdim=True), 0.0)
    assert_close(actual, expected, 2 * ROUNDING[dtype], 2e-5)
    assert (actual[~bits] == 0).all()
    assert actual[5].abs().sum() > 0


def test_a_mask_that_changes_before_the_backward_pass_is_an_error():
    allowed = torch.tensor([[0b1011]], dtype=torch.int32)
    logits = torch.randn(2, 4, requires_grad=True)
    found = dmax_kernels.token_logprobs(logits, torch.ones(2).long(), allowed=allowed)
    allowed.fill_(-1)  # as a decoding loop refills it
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found.logprob.sum().backward()


@pytest.mark.parametrize(
    ("logits", "ids", "options", "message"),
    [
        (torch.ones(2, 3).double(), torch.zeros(2).long(), {}, "logits must be float32"),
        (torch.ones(2, 3), torch.zeros(2), {}, "ids must be int64 or int32, got float32"),
        (torch.ones(2, 3), torch.zeros(3).long(), {}, "ids must have shape .*, got"),
        (torch.ones(2, 3), torch.zeros(3, 1).long(), {}, "ids must have shape .*, got"),
        (torch.ones(2, 3), torch.zeros(2, 0).long(), {}, "ids must hold at least one token"),
        (torch.ones(2, 3), torch.tensor([0, 3]), {}, r"ids must be -100 .* \[0, 3\), got 3 at"),
        (torch.ones(2, 3), torch.zeros(2).long(), {"top_n": 4}, r"top_n must be in 0..3 .*, got 4"),
        (torch.ones(2, 99), torch.zeros(2).long(), {"top_n": 21}, "top_n must be in 0..20 .*, got"),
        (torch.ones(2, 3), torch.zeros(2).long(), {"temperature": 0.0}, "temperature must be"),
    ],
)
def test_bad_input(logits, ids, options, message):
    with pytest.raises(RuntimeError, match="^token_logprobs: " + message):
        dmax_kernels.token_logprobs(logits, ids, **options)
