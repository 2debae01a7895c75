"""linear_top1_confidence and linear_sample_tokens: values, edges, memory, precision."""

import subprocess
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import float64
import pytest
import torch
from masks import random_mask
from tolerances import assert_close
from triton_device import DEVICE, chunked_from, triton_op

import dmax_kernels
from dmax_kernels import reference

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's inf - inf


def triton_from(least_chunked_rows):
    """Triton's ops, which take the library's product of chunks of the vocabulary from this many
    rows on, and the fused kernel below."""

    def op(name):
        def call(*arguments, **options):
            with chunked_from(least_chunked_rows):
                return triton_op(name, *arguments, **options)

        return call

    names = ("linear_top1_confidence", "linear_sample_tokens")
    return SimpleNamespace(**{name: op(name) for name in names})


BACKENDS = {
    "reference": reference,
    "cpu": dmax_kernels,
    "triton": triton_from(None),
    "triton in chunks": triton_from(1),
}
everywhere = pytest.mark.parametrize("backend", BACKENDS)
# Triton's interpreter multiplies the bits of bfloat16 as integers: float16 stands in for it there
DTYPES = (torch.float32, torch.float16) if DEVICE.type == "cpu" else (torch.float32, torch.bfloat16)


def held_inputs(rows, vocab_size, dim, dtype=torch.float32):
    """Small integers: every product and sum is exact in float32, whatever the order."""
    generator = torch.manual_seed(rows + vocab_size)

    def integers(*shape):
        return torch.randint(-3, 4, shape, generator=generator).to(dtype)

    return integers(rows, dim), integers(vocab_size, dim), integers(vocab_size)


# One row, the fewest that a tensor core takes, and more; one token, a cut tile, several tiles; a
# width within a step, and of several steps with a cut one. 1,100 tokens and 520 rows are two blocks
# of the CPU's in both directions (fewer under the interpreter, for time; 4,200 are two chunks)
@everywhere
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "vocab_size", "dim"),
    [
        (1, 1, 1),
        (3, 300, 40),
        (17, 130, 33),
        (520, 1100, 24),
    ],
)
def test_exact_against_float64(backend, dtype, rows, vocab_size, dim):
    if rows == 520 and backend.startswith("triton") and DEVICE.type == "cpu":
        rows, vocab_size = (3, 4200) if "chunks" in backend else (66, 1100)
    hidden, weight, bias = held_inputs(rows, vocab_size, dim, dtype)
    for own_bias in (None, bias):
        options = {"temperature": 5.0, "suppress_token": vocab_size // 2 if vocab_size > 1 else -1}
        logits = hidden.double() @ weight.double().t()
        if own_bias is not None:
            logits = logits + own_bias.double()
        token, confidence = BACKENDS[backend].linear_top1_confidence(
            hidden, weight, own_bias, **options
        )
        expected, expected_confidence = float64.top1_confidence(logits, **options)
        assert torch.equal(token, expected)  # ties and all
        assert_close(confidence, expected_confidence, 1e-5)


@everywhere
@pytest.mark.parametrize(("rows", "vocab_size"), [(3, 300), (66, 1100)])
def test_masks(backend, rows, vocab_size):
    """Exactly as with the logits that are not allowed at -inf; a row with nothing allowed."""
    hidden, weight, bias = held_inputs(rows, vocab_size, 24)
    logits = hidden.double() @ weight.double().t() + bias.double()
    for mask_rows in (rows, 1):
        allowed, bits = random_mask(mask_rows, vocab_size, density=0.1)
        if mask_rows > 1:
            allowed[2], bits[2] = 0, False
        token, confidence = BACKENDS[backend].linear_top1_confidence(
            hidden, weight, bias, allowed=allowed, temperature=5.0
        )
        masked = logits.masked_fill(~bits, -torch.inf)
        expected, expected_confidence = float64.top1_confidence(masked, 5.0)
        assert torch.equal(token, expected)
        assert_close(confidence, expected_confidence, 1e-5)


@pytest.mark.parametrize("functions", [dmax_kernels, reference], ids=["cpu", "reference"])
def test_suppressed_tokens_and_padded_heads(functions):
    hidden, weight, bias = held_inputs(5, 330, 24)
    options = {"suppress_tokens": (7, 31, 32), "vocab_limit": 300, "temperature": 5.0}
    actual = functions.linear_top1_confidence(hidden, weight, bias, **options)
    logits = (hidden @ weight.t() + bias)[:, :300].index_fill(
        -1, torch.tensor([7, 31, 32]), -torch.inf
    )
    expected, expected_confidence = float64.top1_confidence(logits, 5.0)
    assert torch.equal(actual[0], expected)
    assert_close(actual[1], expected_confidence, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_logits_are_not_rounded(dtype):
    """257 and 256 are one number in bfloat16; in float16, 4097 and 4096."""
    step = 256.0 if dtype == torch.bfloat16 else 4096.0
    hidden = torch.tensor([[step / 64, 1.0]], dtype=dtype)
    weight = torch.tensor([[64.0, 0.0], [64.0, 1.0]], dtype=dtype)
    token, _ = dmax_kernels.linear_top1_confidence(hidden, weight)
    assert token.item() == 1
    assert (hidden @ weight.t()).argmax().item() == 0


@everywhere
def test_undefined_logits(backend):
    """Logits are the weight itself (hidden 1, D = 1): the first NaN, else the first +inf."""
    weight = torch.zeros(300, 1)
    weight[140], weight[299] = torch.inf, torch.inf
    for expected in (140, 200):
        token, confidence = BACKENDS[backend].linear_top1_confidence(torch.ones(1, 1), weight)
        assert token.tolist() == [expected]
        assert confidence.isnan().all()
        weight[200], weight[250] = torch.nan, torch.nan
    minus_inf = torch.full((300, 1), -torch.inf)
    token, confidence = BACKENDS[backend].linear_top1_confidence(torch.ones(1, 1), minus_inf)
    assert token.tolist() == [0]
    assert confidence.isnan().all()
    minus_inf[170] = -1.0
    token, confidence = BACKENDS[backend].linear_top1_confidence(torch.ones(1, 1), minus_inf)
    assert (token.item(), confidence.item()) == (170, 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_undefined_logits_leave_other_tokens_and_rows_alone(dtype):
    """With 33 rows and 300 tokens: a NaN weight reaches every row, a NaN row no other row."""
    hidden, weight, _ = held_inputs(33, 300, 40, dtype)
    hidden[17] = torch.nan
    token, confidence = dmax_kernels.linear_top1_confidence(hidden, weight)
    expected, _ = float64.top1_confidence(hidden.double() @ weight.double().t())
    assert torch.equal(token, expected)
    assert confidence.isnan().nonzero().tolist() == [[17]]
    weight[299] = torch.nan
    token, confidence = dmax_kernels.linear_top1_confidence(hidden, weight)
    assert token.tolist() == [0 if row == 17 else 299 for row in range(33)]
    assert confidence.isnan().all()


@pytest.fixture
def other_threads():
    """A context in which PyTorch has a different number of threads."""

    @contextmanager
    def changed():
        threads = torch.get_num_threads()
        torch.set_num_threads(1 if threads > 1 else 2)
        try:
            yield
        finally:
            torch.set_num_threads(threads)

    return changed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_cpu_bits_of_few_rows_depend_on_the_row_alone(dtype, other_threads):
    """Up to 8 rows, a row depends neither on the others nor on the threads. 320 fills vectors, 331
    does not."""
    assert_bits_of_the_row_alone(dtype, 8, (slice(0, 8), slice(7, 8), slice(2, 5)), other_threads)


@pytest.mark.skipif(
    dmax_kernels.libraries.instruction_set() not in ("avx512, bf16", "avx512, amx"),
    reason="the CPU has no bfloat16 product",
)
def test_cpu_bits_of_bfloat16_rows_depend_on_the_row_alone(other_threads):
    """With a bfloat16 product of our own, the same from 13 rows on; 300 are two blocks of rows."""
    assert_bits_of_the_row_alone(
        torch.bfloat16, 300, (slice(0, 13), slice(250, 266), slice(5, 38)), other_threads
    )


def assert_bits_of_the_row_alone(dtype, all_rows, some_rows, other_threads):
    generator = torch.manual_seed(0)
    for dim in (320, 331):
        hidden = torch.randn(all_rows, dim, generator=generator).to(dtype)
        weight = (0.1 * torch.randn(700, dim, generator=generator)).to(dtype)
        expected = dmax_kernels.linear_top1_confidence(hidden, weight)
        assert (expected[1] < 0.9).any()  # where a rounding shows
        with other_threads():
            for rows in some_rows:
                results = dmax_kernels.linear_top1_confidence(hidden[rows], weight)
                for one, among_others in zip(results, expected, strict=True):
                    assert torch.equal(one, among_others[rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_cpu_many_rows(dtype):
    """More rows go through PyTorch's product: the same call repeats its bits, and a row among
    others agrees with the row alone to the product's rounding. 300 rows are two blocks of rows."""
    generator = torch.manual_seed(0)
    hidden = torch.randn(300, 320, generator=generator).to(dtype)
    weight = (0.1 * torch.randn(700, 320, generator=generator)).to(dtype)
    expected = dmax_kernels.linear_top1_confidence(hidden, weight)
    again = dmax_kernels.linear_top1_confidence(hidden, weight)
    assert all(torch.equal(*pair) for pair in zip(expected, again, strict=True))
    for rows in (slice(299, 300), slice(5, 38), slice(250, 266)):
        token, confidence = dmax_kernels.linear_top1_confidence(hidden[rows], weight)
        assert torch.equal(token, expected[0][rows])
        assert_close(confidence, expected[1][rows], 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [3, 20])
def test_cpu_strides(dtype, rows):
    """Rows apart in memory, a transposed matrix, and neither rows nor columns adjacent."""
    _, weight, _ = held_inputs(rows, 300, 40, dtype)
    expected = dmax_kernels.linear_top1_confidence(weight[:rows].clone(), weight)
    padded = torch.full((300, 47), 7.0, dtype=dtype)[:, :40].copy_(weight)
    sparse = torch.full((600, 80), 7.0, dtype=dtype)[::2, ::2].copy_(weight)
    for strided in (padded, weight.t().contiguous().t(), sparse):
        results = dmax_kernels.linear_top1_confidence(strided[:rows], strided)
        assert torch.equal(results[0], expected[0])
        assert_close(results[1], expected[1], 1e-6)


# All three; the value tests above have two
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_tokens_of_every_dtype(dtype):
    hidden, weight, bias = held_inputs(37, 333, 300, dtype)
    token, _ = dmax_kernels.linear_top1_confidence(hidden, weight, bias)
    assert torch.equal(token, (hidden.double() @ weight.double().t() + bias.double()).argmax(-1))


@everywhere
def test_strides_and_shapes(backend):
    op = BACKENDS[backend].linear_top1_confidence
    hidden, weight, bias = held_inputs(6, 140, 24)
    expected = reference.linear_top1_confidence(hidden, weight, bias)
    padded = torch.full((6, 31), 7.0)[:, :24].copy_(hidden)
    for strided in (padded, hidden.t().contiguous().t()):
        assert torch.equal(op(strided, weight.t().contiguous().t(), bias)[0], expected[0])
    two_d = op(hidden.view(2, 3, 24).transpose(0, 1), weight, bias)[0]
    assert torch.equal(two_d, expected[0].view(2, 3).t())
    assert op(hidden[0], weight, bias)[0].shape == ()
    assert op(hidden[:0], weight)[0].shape == (0,)


def test_autocast_changes_nothing():
    hidden, weight, bias = held_inputs(6, 140, 24)
    hidden += 2**-12  # needs more than a bfloat16
    expected = dmax_kernels.linear_top1_confidence(hidden, weight, bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = dmax_kernels.linear_top1_confidence(hidden, weight, bias)
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])


# ---- linear_sample_tokens


# Exact logits (small integers), so that only the noise's rounding could tell backends apart. A seed
# per call, where the row enters the counter, and one per row; two tiles of every backend
@everywhere
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize(("rows", "vocab_size"), [(1, 1), (3, 1100), (18, 150)])
def test_samples_of_the_stored_logits(backend, per_row, rows, vocab_size):
    hidden, weight, bias = held_inputs(rows, vocab_size, 24)
    seed = torch.tensor([2**62 + 5, -(2**40)])
    if per_row:
        seed = torch.randint(-(2**62), 2**62, (rows, 2), generator=torch.manual_seed(1))
    options = {"temperature": 9.0, "suppress_token": vocab_size - 1 if vocab_size > 1 else -1}
    logits = hidden @ weight.t() + bias
    expected, *expected_floats = reference.sample_tokens(logits, seed, **options)
    token, *floats = BACKENDS[backend].linear_sample_tokens(hidden, weight, seed, bias, **options)
    assert torch.equal(token, expected)
    for actual, wanted in zip(floats, expected_floats, strict=True):
        assert_close(actual, wanted, 1e-5)


@everywhere
def test_greedy_is_top1(backend):
    hidden, weight, bias = held_inputs(4, 150, 24)
    greedy = BACKENDS[backend].linear_sample_tokens(
        hidden, weight, torch.tensor([1, 2]), bias, temperature=0.0
    )
    expected = dmax_kernels.linear_top1_confidence(hidden, weight, bias)
    assert torch.equal(greedy[0], expected[0])
    assert_close(greedy[1], expected[1], 1e-5)


@everywhere
def test_only_the_rows_asked_for(backend):
    """The masked positions alone give the samples they have among all."""
    hidden, weight, _ = held_inputs(6, 150, 24)
    seed = torch.arange(12).view(6, 2)
    masked = torch.tensor([True, False, False, True, False, True])
    op = BACKENDS[backend].linear_sample_tokens
    everything = op(hidden, weight, seed)[0]
    of_masked = op(hidden[masked], weight, seed[masked])[0]
    assert torch.equal(of_masked, everything[masked])


def test_distribution():
    """chi-squared of 20,000 draws from 5 classes: 4 degrees of freedom, p = 1e-4 at 23.5."""
    probability = torch.tensor([0.5, 0.25, 0.15, 0.08, 0.02])
    draws = 20_000
    hidden = torch.ones(draws, 1)
    token, reported, *_ = dmax_kernels.linear_sample_tokens(
        hidden, probability.log()[:, None], torch.tensor([17, 1])
    )
    counts = torch.bincount(token, minlength=5)
    chi_squared = ((counts - draws * probability).square() / (draws * probability)).sum()
    assert chi_squared < 23.5
    assert_close(reported, probability[token], 1e-5)


@everywhere
def test_samples_of_undefined_logits(backend):
    weight = torch.zeros(300, 1)
    weight[140] = torch.inf
    for value, expected in ((torch.inf, 140), (torch.nan, 140)):
        weight[140] = value
        token, probability, *_ = BACKENDS[backend].linear_sample_tokens(
            torch.ones(1, 1), weight, torch.tensor([1, 2])
        )
        assert token.tolist() == [expected]
        assert probability.isnan().all()
    token, probability, *_ = BACKENDS[backend].linear_sample_tokens(
        torch.ones(1, 1), torch.full((300, 1), -torch.inf), torch.tensor([1, 2])
    )
    assert token.tolist() == [0]
    assert probability.isnan().all()


# ---- Gradients and memory


def test_no_gradient_is_an_error():
    hidden = torch.randn(3, 4, requires_grad=True)
    _, confidence = dmax_kernels.linear_top1_confidence(hidden, torch.randn(9, 4))
    with pytest.raises(RuntimeError, match="linear_top1_confidence: has no gradient"):
        confidence.sum().backward()


MEMORY = """
import resource, sys, torch, dmax_kernels
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
torch.set_num_threads(1)
hidden = torch.ones(256, 64, dtype=torch.bfloat16)
def run(vocab_size):
    weight = torch.ones(vocab_size, 64, dtype=torch.bfloat16)
    before = peak()
    dmax_kernels.linear_top1_confidence(hidden, weight)
    return peak() - before
run(2048)
print(run(int(sys.argv[1])))
"""


@pytest.mark.parametrize("vocab_size", [8192, 157184])
def test_cpu_memory_does_not_depend_on_the_vocabulary(vocab_size):
    """Float32 logits would take 8 and 154 MiB, the widened weight 2 and 38."""
    result = subprocess.run(
        [sys.executable, "-c", MEMORY, str(vocab_size)], capture_output=True, text=True, check=True
    )
    assert float(result.stdout) < 4
