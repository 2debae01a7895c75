"""row_statistics with a temperature per row: values, bits, layouts, messages, on every backend."""

import math

import float64
import pytest
import simt_ops
import torch
from cases import DTYPES, logit_rows, stacked_rows
from simt_ops import CHOSEN, H200, H200_CLUSTERS, ONE_MULTIPROCESSOR
from test_statistics import SLACK, ignore_interpreter, same_bits
from tolerances import assert_statistics
from triton_device import triton_op

import dmax_kernels
from dmax_kernels import reference
from dmax_kernels.ops._temperature import read_temperature
from dmax_kernels.triton.launch import TILE

pytestmark = ignore_interpreter


def triton(logits, *, temperature, **options):
    number, temperatures = read_temperature(logits, temperature)
    return triton_op(
        "row_statistics", logits, temperature=number, temperatures=temperatures, **options
    )


OPS = {
    "reference": reference.row_statistics,
    "cpu": dmax_kernels.row_statistics,
    "cuda": simt_ops.row_statistics,
    "triton": triton,
}
FUSED = [name for name in OPS if name != "reference"]
LEAST, MOST = 1e-30, 1e30


def temperatures_of(rows, seed=0):
    """From nearly greedy to nearly flat, and the ends of the range."""
    values = torch.empty(rows).uniform_(-1.5, 1.5, generator=torch.manual_seed(seed)).exp()
    values[1::5] = 1.0
    return values


def row_by_row(op, logits, temperature, **options):
    """The number form, a row at a time."""
    rows = [
        op(row.unsqueeze(0), temperature=t, **options)
        for row, t in zip(logits, temperature.tolist(), strict=True)
    ]
    return [torch.cat(each) for each in zip(*rows, strict=True)]


# Every edge case at a temperature of its own; two tiles, the second cut
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPS)
def test_values(name, dtype):
    _, logits = stacked_rows(5000, dtype)
    if name == "triton":
        logits = logits[:: len(logits) // 6]
    temperature = temperatures_of(len(logits))
    expected = float64.row_statistics(logits, temperature.double().unsqueeze(-1))
    assert_statistics(OPS[name](logits, temperature=temperature), expected, SLACK.get(name, 1.0))


@pytest.mark.parametrize("name", OPS)
def test_the_ends_of_the_range(name):
    """Both ends in one call: one winner or ties at the least, all alike at the most."""
    chosen = [logit_rows(2049)[n] for n in ("peaked", "flat", "tie_of_neighbours", "nans", "infs")]
    logits = torch.stack(chosen + chosen)
    temperature = torch.tensor([LEAST] * 5 + [MOST] * 5)
    expected = float64.row_statistics(logits, temperature.double().unsqueeze(-1))
    assert_statistics(OPS[name](logits, temperature=temperature), expected, SLACK.get(name, 1.0))


# Few long rows, whose tiles all threads share, and many; a block per row, blocks and a cluster
@pytest.mark.parametrize("num_rows", [3, 8])
def test_rows_have_the_bits_of_their_own_temperature_on_the_cpu(num_rows):
    logits = (3 * torch.randn(num_rows, 400_000, generator=torch.manual_seed(1))).bfloat16()
    temperature = temperatures_of(num_rows)
    threads = torch.get_num_threads()
    expected = row_by_row(dmax_kernels.row_statistics, logits, temperature)
    try:
        for num_threads in (1, 3):
            torch.set_num_threads(num_threads)
            actual = dmax_kernels.row_statistics(logits, temperature=temperature)
            assert all(map(same_bits, actual, expected))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("gpu", "shape"), [(H200, "split"), (H200_CLUSTERS, "cluster"), (ONE_MULTIPROCESSOR, "whole")]
)
def test_rows_have_the_bits_of_their_own_temperature_on_cuda(gpu, shape, dtype):
    logits = 3 * torch.randn(5, 9 * 2048 + 3, generator=torch.manual_seed(2))
    logits[1, 7000], logits[2, 3] = math.nan, math.inf
    logits, temperature = logits.to(dtype), temperatures_of(5)
    actual = simt_ops.row_statistics(logits, temperature=temperature, suppress_token=70, gpu=gpu)
    chosen = CHOSEN[-1]
    assert {"split": chosen.splits > 1 and chosen.cluster == 1, "cluster": chosen.cluster > 1,
            "whole": chosen.splits == 1}[shape]  # fmt: skip
    expected = row_by_row(simt_ops.row_statistics, logits, temperature, suppress_token=70)
    assert all(map(same_bits, actual, expected))


@pytest.mark.parametrize("name", FUSED)
def test_rows_have_the_bits_of_their_own_temperature(name):
    """Edges, beside a mask for each row."""
    _, logits = stacked_rows(TILE + 37 if name == "triton" else 3049, torch.float16)
    logits = logits[::5]
    words = -(-logits.shape[1] // 32)
    allowed = torch.randint(-(2**31), 2**31, (len(logits), words), dtype=torch.int32,
                            generator=torch.manual_seed(3))  # fmt: skip
    temperature = temperatures_of(len(logits))
    actual = OPS[name](logits, temperature=temperature, allowed=allowed, suppress_token=5)
    for row, value in enumerate(temperature.tolist()):
        one = slice(row, row + 1)
        alone = OPS[name](logits[one], temperature=value, allowed=allowed[one], suppress_token=5)
        assert all(same_bits(a[one], b) for a, b in zip(actual, alone, strict=True)), row


@pytest.mark.parametrize("name", OPS)
def test_layouts(name):
    """One for each request, for each position, for all; no elements or strides of its own."""
    logits = torch.randn(2, 3, 60, generator=torch.manual_seed(4))
    whole = temperatures_of(6).view(2, 3)
    for given in (whole[:, :1], whole[:1], whole[0], whole[0, 0], whole, whole.t().contiguous().t(),
                  whole.repeat_interleave(2, dim=1)[:, ::2]):  # fmt: skip
        actual = OPS[name](logits, temperature=given)
        expected = OPS[name](logits, temperature=given.expand(2, 3).contiguous())
        assert all(map(same_bits, actual, expected)), given.shape
        assert actual[3].shape == (2, 3)
        flat = OPS[name](logits.view(6, 60), temperature=given.expand(2, 3).reshape(6))
        assert all(same_bits(a.view(6), b) for a, b in zip(actual, flat, strict=True))
    alone = OPS[name](logits[0, 0], temperature=whole[0, 0])
    assert {x.shape for x in alone} == {()}
    if name != "cuda":  # the runner has no launch without rows
        nothing = OPS[name](logits[:, :0], temperature=whole[:, :0])
        assert {x.shape for x in nothing} == {(2, 0)}


OUT_OF_RANGE = [0.0, -1.0, math.nan, math.inf, 1e-31, 2e30]


@pytest.mark.parametrize("value", OUT_OF_RANGE)
def test_out_of_range_is_refused_on_the_cpu(value):
    temperature = torch.tensor([[1.0, 0.5], [value, 2.0]])
    message = r"row_statistics: temperature must be at least 1e-30 .*, got .* in row 2$"
    with pytest.raises(RuntimeError, match=message):
        dmax_kernels.row_statistics(torch.zeros(2, 2, 9), temperature=temperature)


# On a GPU they are not read before the launch; Triton is called without the check here
@pytest.mark.parametrize(
    ("name", "options"),
    [("cuda", {"gpu": gpu}) for gpu in (H200, H200_CLUSTERS, ONE_MULTIPROCESSOR)]
    + [("triton", {})],
)
def test_out_of_range_is_nan_on_a_gpu(name, options):
    logits = torch.randn(8, 2 * TILE + 3, generator=torch.manual_seed(5))
    logits[6, 9], logits[7, 10:] = math.nan, -math.inf  # nor a row without a softmax
    logits[:, 0] = -9.0
    temperature = torch.tensor([0.0, 1.0, -1.0, math.nan, 0.5, math.inf, 1e-31, 2e30])
    actual = OPS[name](logits, temperature=temperature, **options)
    valid = temperature.eq(1.0) | temperature.eq(0.5)
    assert (actual[0] == 0).tolist() == (~valid).tolist()
    for each in actual[1:]:
        assert each.isnan().tolist() == (~valid).tolist()
    expected = row_by_row(OPS[name], logits[valid], temperature[valid], **options)
    assert all(same_bits(a[valid], b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize(
    ("temperature", "message"),
    [
        (torch.ones(2).double(), "temperatures must be float32, got float64"),
        (torch.ones(2, dtype=torch.int64), "temperatures must be float32, got int64"),
        (
            torch.ones(3),
            r"temperatures must have shape \[4, 2\] \(one per row of logits\), got \[3\]",
        ),
        (
            torch.ones(1, 4, 2),
            r"temperatures must have shape \[4, 2\] .*, got \[1, 4, 2\]",
        ),
    ],
)
def test_bad_input(temperature, message):
    with pytest.raises(RuntimeError, match=f"^row_statistics: {message}"):
        dmax_kernels.row_statistics(torch.zeros(4, 2, 9), temperature=temperature)


def test_one_temperature_alone():
    with pytest.raises(RuntimeError, match="temperature must be left at 1 where temperatures are"):
        torch.ops.dmax.row_statistics(
            torch.zeros(2, 5), temperature=2.0, temperatures=torch.ones(2)
        )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs two devices")
def test_temperatures_on_another_device():
    with pytest.raises(RuntimeError, match="temperatures must be on the same device as logits"):
        dmax_kernels.row_statistics(torch.zeros(2, 5, device="cuda"), temperature=torch.ones(2))


def test_a_new_temperature_compiles_nothing_again():
    """Fake kernel and compiled call: shapes without values, then the values."""
    logits, temperature = torch.randn(3, 4, 50), temperatures_of(3).unsqueeze(-1)
    compiled = torch.compile(
        lambda x, t: dmax_kernels.row_statistics(x, temperature=t), backend="eager", fullgraph=True
    )
    for t in (temperature, 2 * temperature):
        expected = dmax_kernels.row_statistics(logits, temperature=t)
        assert all(map(torch.equal, compiled(logits, t), expected))
    on_meta = dmax_kernels.row_statistics(logits.to("meta"), temperature=temperature.to("meta"))
    assert {x.shape for x in on_meta} == {(3, 4)}
