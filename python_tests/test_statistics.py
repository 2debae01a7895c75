"""row_statistics on every backend: the reference and the CPU here, CUDA's source on the host
(csrc/simt) and Triton under its interpreter. All are compared with float64.
"""

import math

import float64
import pytest
import simt_ops
import torch
from cases import (
    DTYPES,
    LARGE_VOCABS,
    SMALL_VOCABS,
    logit_rows,
    stacked_rows,
    strided_copies,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from simt_ops import CHOSEN, H200, ONE_MULTIPROCESSOR
from tolerances import (
    ENTROPY_RTOL,
    assert_close,
    assert_statistics,
)
from triton_device import triton_op

import dmax_kernels
from dmax_kernels import RowStatistics, reference
from dmax_kernels.triton.launch import TILE, choose_tiles


def triton(logits, **options):
    return triton_op("row_statistics", logits, **options)


OPS = {
    "reference": reference.row_statistics,
    "cpu": dmax_kernels.row_statistics,
    "cuda": simt_ops.row_statistics,
    "triton": triton,
}
FUSED = [name for name in OPS if name != "reference"]
# The references sum in whatever order eager PyTorch does
SLACK = {"reference": 5.0}
ignore_interpreter = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # its inf - inf
pytestmark = ignore_interpreter


def assert_right(name, logits, **options):
    actual = OPS[name](logits, **options)
    assert_statistics(actual, float64.row_statistics(logits, **options), SLACK.get(name, 1.0))
    return actual


def same_bits(a, b):
    return torch.equal(a.nan_to_num(-1.0), b.nan_to_num(-1.0)) and torch.equal(a.isnan(), b.isnan())


# Every edge case in every dtype at every small V: tails, tiles, ties at each level of the
# reduction, NaN, infinities, offsets. Triton's interpreter is slow: one token, one V within a tile,
# and two tiles, the second cut, each in a different dtype
@pytest.mark.parametrize(
    ("name", "vocab_size", "dtype"),
    [(n, v, d) for n in ("reference", "cpu", "cuda") for v in SMALL_VOCABS for d in DTYPES]
    + [("triton", v, d) for v, d in zip((1, 127, 5000), DTYPES, strict=True)],
)
def test_edge_cases(name, vocab_size, dtype):
    _, logits = stacked_rows(vocab_size, dtype)
    assert_right(name, logits)


# The real vocabulary, aligned and odd: on the CPU one row and three take the tiled path, eight the
# row path
@pytest.mark.parametrize("num_rows", [1, 3, 8])
@pytest.mark.parametrize("vocab_size", LARGE_VOCABS)
def test_large_vocabulary(num_rows, vocab_size):
    logits = 3 * torch.randn(num_rows, vocab_size, generator=torch.manual_seed(1))
    assert_right("cpu", logits)
    for name in ("cuda", "triton") if num_rows == 1 else ():
        assert_right(name, logits.bfloat16())


# Rows whose tiles lie in several blocks, and in one: both merge ties, NaN and the runner-up
@pytest.mark.parametrize(("gpu", "splits"), [(H200, 2), (ONE_MULTIPROCESSOR, 1)])
def test_split_rows_of_cuda(gpu, splits):
    _, logits = stacked_rows(9 * 2048 + 3, torch.bfloat16)
    actual = simt_ops.row_statistics(logits, gpu=gpu, suppress_token=70)
    assert CHOSEN[-1].splits == splits
    assert_statistics(actual, float64.row_statistics(logits, suppress_token=70))


@pytest.mark.parametrize(("order", "seed", "resident"), [("reversed", 0, 1), ("random", 1, 4)])
def test_cuda_in_any_order(order, seed, resident):
    logits = torch.stack([logit_rows(9 * 2048 + 3)[n] for n in ("normal", "nans")]).bfloat16()
    expected = simt_ops.row_statistics(logits)
    with simt_ops.order(order, seed, resident):
        actual = simt_ops.row_statistics(logits)
    assert CHOSEN[-1].splits > 1
    assert all(map(same_bits, actual, expected))


# Beyond 1,536 tiles a block's shared memory cannot hold a row's partial results
@pytest.mark.slow
def test_cuda_vocabulary_beyond_shared_memory():
    logits = torch.zeros(5, 1537 * 1024)
    logits[:, 999_999] = 14.0
    actual = simt_ops.row_statistics(logits, gpu=ONE_MULTIPROCESSOR)
    assert CHOSEN[-1].splits == 2
    expected = float64.row_statistics(logits[:1])
    assert_statistics(actual, [each.expand(5) for each in expected])


# The same token, confidence and runner-up as from the ops that give them alone, to the last bit
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_same_bits_as_top1_and_topk(backend, dtype):
    ops = {"cpu": dmax_kernels, "cuda": simt_ops}[backend]
    _, edges = stacked_rows(5000, dtype)
    normal = (3 * torch.randn(3, 40_000, generator=torch.manual_seed(4))).to(dtype)
    for logits in (edges, normal, 5 * normal):
        options = {"temperature": 0.7, "suppress_token": 6}
        token, confidence, runner_up, _, _ = ops.row_statistics(logits, **options)
        expected_token, expected = ops.top1_confidence(logits, **options)
        assert torch.equal(token, expected_token)
        assert same_bits(confidence, expected)
        assert same_bits(runner_up, ops.topk_confidence(logits, 2, **options)[1][:, 1])


def test_triton_confidence_is_that_of_top1():
    names = ("normal", "tie_across_tiles", "large_offset", "infs")
    logits = torch.stack([logit_rows(5000)[name] for name in names]).bfloat16()
    token, confidence, *_ = triton(logits)
    expected_token, expected = triton_op("top1_confidence", logits)
    assert torch.equal(token, expected_token)
    assert same_bits(confidence, expected)


@pytest.mark.parametrize("temperature", [1e-30, 1e-3, 0.7, 5.0, 1e6])
@pytest.mark.parametrize("name", OPS)
def test_temperature(name, temperature):
    rows = logit_rows(2049)
    if temperature == 1e-30:  # one winner or ties, and a logsumexp of 1e30
        rows = {n: rows[n] for n in ("peaked", "flat", "tie_of_neighbours", "nans", "infs")}
    elif temperature == 1e-3:  # at 1e4 float32's differences are a nat or more
        rows = {n: x for n, x in rows.items() if "offset" not in n}
    logits = torch.stack(list(rows.values()))
    assert_right(name, logits[::3] if name == "triton" else logits, temperature=temperature)


# First, last, the winner itself, the runner-up, a NaN, a +inf, tiles' edges
@pytest.mark.parametrize("suppress_token", [0, 3, 5, 6, 2047, 2048, 3048])
@pytest.mark.parametrize("name", OPS)
def test_suppressed_token(name, suppress_token):
    _, logits = stacked_rows(3049, torch.float16)
    if name == "triton":
        logits = logits[3:20:4]
    assert_right(name, logits, suppress_token=suppress_token)


@pytest.mark.parametrize("name", OPS)
def test_only_token_suppressed(name):
    token, confidence, runner_up, entropy, logsumexp = OPS[name](torch.ones(2, 1), suppress_token=0)
    assert token.tolist() == [0, 0]
    assert logsumexp.tolist() == [-math.inf] * 2
    for each in (confidence, runner_up, entropy):
        assert each.isnan().all()


@pytest.mark.parametrize("name", OPS)
def test_known_rows(name):
    """One token; a certain one; two equal ones, in one tile and far apart; all equal."""
    certain = torch.full((9000,), -torch.inf)
    certain[8500] = -3.0
    two = certain.clone()
    two[8501] = -3.0
    apart = certain.clone()
    apart[1] = -3.0
    _, confidence, runner_up, entropy, logsumexp = OPS[name](
        torch.stack([certain, two, apart, torch.zeros(9000)])
    )
    assert confidence[:3].tolist() == [1.0, 0.5, 0.5]
    assert runner_up[:3].tolist() == [0.0, 0.5, 0.5]
    assert entropy[0] == 0.0
    expected = torch.tensor([math.log(2), math.log(2), math.log(9000)])
    assert_close(entropy[1:], expected, 5e-7)
    assert_close(logsumexp, torch.tensor([-3.0, math.log(2) - 3, math.log(2) - 3, expected[2]]),
                 5e-7)  # fmt: skip
    token, confidence, runner_up, entropy, logsumexp = OPS[name](torch.tensor([5.0]))
    values = [x.item() for x in (token, confidence, runner_up, entropy, logsumexp)]
    assert values == [0, 1.0, 0.0, 0.0, 5.0]


# The winner stands `gap` above 5,000 others: an entropy down to 1e-12 keeps its digits. The
# CPU's sum for the confidence stops at 30
@pytest.mark.parametrize("name", FUSED)
def test_sure_rows_keep_the_relative_precision(name):
    gaps = torch.tensor([1.0, 8.0, 15.0, 25.0, 29.5, 30.5, 35.0, 39.0])
    logits = torch.rand(len(gaps), 5000, generator=torch.manual_seed(5))
    logits[:, 4321] = 1.0 + gaps
    _, _, _, entropy, _ = OPS[name](logits)
    _, _, _, expected, _ = float64.row_statistics(logits)
    assert expected[-1] < 1e-11
    assert_close(entropy, expected, ENTROPY_RTOL)


def test_dtypes_strides_and_shapes():
    _, logits = stacked_rows(2049, torch.float16)
    for op in (dmax_kernels.row_statistics, simt_ops.row_statistics):
        expected = op(logits)
        for name, copy in strided_copies(logits).items():
            assert all(map(same_bits, op(copy), expected)), name
    logits = torch.randn(2, 3, 4, 50)
    result = dmax_kernels.row_statistics(logits)
    assert isinstance(result, RowStatistics)
    assert {x.shape for x in result} == {(2, 3, 4)}
    assert {x.shape for x in dmax_kernels.row_statistics(logits[0, 0, 0])} == {()}
    for op in (dmax_kernels.row_statistics, triton):
        assert {x.shape for x in op(logits[:, :0])} == {(2, 0, 4)}
    expanded = dmax_kernels.row_statistics(logits[:1].expand(5, 3, 4, 50))  # stride 0
    assert torch.equal(expanded.entropy, result.entropy[:1].expand(5, 3, 4))
    shuffled = dmax_kernels.row_statistics(logits.permute(2, 0, 1, 3))  # no common stride
    assert torch.equal(shuffled.entropy, result.entropy.permute(2, 0, 1))
    assert torch.equal(triton(logits.transpose(0, 1))[0], result.token.transpose(0, 1))


# Alone, among 3 (tiled path) and among 16 (row path), on any number of threads
def test_same_row_same_bits():
    logits = (3 * torch.randn(16, 157184, generator=torch.manual_seed(2))).bfloat16()
    everything = dmax_kernels.row_statistics(logits)
    threads = torch.get_num_threads()
    try:
        for num_threads in (1, 2, 5):
            torch.set_num_threads(num_threads)
            for rows in (slice(7, 8), slice(5, 8), slice(0, 16)):
                subset = dmax_kernels.row_statistics(logits[rows])
                assert all(torch.equal(a, b[rows]) for a, b in zip(subset, everything, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_same_row_same_bits_on_cuda_and_triton():
    logits = torch.randn(40, 9 * 2048 + 3, generator=torch.manual_seed(3)).bfloat16()
    together = simt_ops.row_statistics(logits, gpu=ONE_MULTIPROCESSOR)
    assert CHOSEN[-1].splits == 1
    alone = simt_ops.row_statistics(logits[7:8].clone())
    assert CHOSEN[-1].splits > 1
    assert all(torch.equal(a, b[7:8]) for a, b in zip(alone, together, strict=True))
    logits = logits[:24, : 2 * TILE + 801]  # two tiles per program, and one
    assert choose_tiles(24, logits.shape[1], logits.device).per_program == 2
    together = triton(logits)
    alone = triton(logits[7:8])
    assert all(torch.equal(a, b[7:8]) for a, b in zip(alone, together, strict=True))


def test_more_than_2_to_31_elements():
    rows, stride, vocab_size = 2200, 1_000_001, 64
    try:
        buffer = torch.empty(rows * stride, dtype=torch.bfloat16)  # untouched pages cost nothing
    except RuntimeError:
        pytest.skip("no address space for a 4.4 GB buffer")
    logits = buffer.as_strided((rows, vocab_size), (stride, 1))
    logits.copy_(torch.randn(rows, vocab_size))
    far = dmax_kernels.row_statistics(logits)
    assert_statistics(far, float64.row_statistics(logits.contiguous()))


VALUES = st.one_of(
    st.floats(-40, 40, width=32),
    st.sampled_from([0.0, -0.0, 1.0, 20.0, math.inf, -math.inf, math.nan, 1e4, -1e4]),
)


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(VALUES, min_size=1, max_size=40),
    width=st.integers(1, 3000),
    temperature=st.sampled_from([0.1, 1.0, 7.0]),
    suppress=st.integers(-1, 39),
)
def test_any_row(values, width, temperature, suppress):
    """Repeated up to `width` tokens: ties throughout, across vectors and tiles."""
    row = torch.tensor(values).repeat(-(-width // len(values)))[:width]
    logits = row.unsqueeze(0)
    options = {"temperature": temperature, "suppress_token": min(suppress, width - 1)}
    for name in ("cpu", "cuda"):
        _, confidence, runner_up, entropy, _ = assert_right(name, logits, **options)
        if not confidence.isnan().any():
            assert 0 <= runner_up <= confidence <= 1
            assert entropy <= math.log(width) * (1 + 1e-6) + 1e-6


def test_no_gradient_is_an_error():
    logits = torch.randn(3, 8, requires_grad=True)
    with pytest.raises(RuntimeError, match="row_statistics: has no gradient; detach the logits"):
        dmax_kernels.row_statistics(logits).entropy.sum().backward()


@pytest.mark.parametrize(
    ("logits", "options", "message"),
    [
        (torch.tensor(1.0), {}, r"logits must be \[..., V\], got a 0-D tensor"),
        (torch.ones(2, 0), {}, r"logits must be \[..., V\] with V >= 1, got \[2, 0\]"),
        (torch.ones(2, 3).double(), {}, "logits must be float32, bfloat16 .*, got float64"),
        (torch.ones(2, 3), {"temperature": 0.0}, "temperature must be at least 1e-30 .*, got 0"),
        (torch.ones(2, 3), {"suppress_token": 3}, "suppress_token must be -1 .* below 3, got 3"),
    ],
)
def test_bad_input(logits, options, message):
    with pytest.raises(RuntimeError, match="^row_statistics: " + message):
        dmax_kernels.row_statistics(logits, **options)
