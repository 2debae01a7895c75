"""linear_sample_tokens: the samples of sample_tokens, from the hidden state."""

import pytest
import torch
from test_linear_rows import held_inputs
from tolerances import assert_close
from triton_device import chunked_from, triton_op

import dmax_kernels
from dmax_kernels import reference

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's inf - inf


def triton(*arguments, **options):
    return triton_op("linear_sample_tokens", *arguments, **options)


def triton_chunks(*arguments, **options):
    with chunked_from(1):
        return triton(*arguments, **options)


BACKENDS = {
    "cpu": dmax_kernels.linear_sample_tokens,
    "triton": triton,
    "triton in chunks": triton_chunks,
}


# Exact logits (small integers), so that only the noise's rounding could tell backends apart. A seed
# per call, where the row enters the counter, and one per row; two tiles of every backend
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize(("rows", "vocab_size"), [(1, 1), (3, 1100), (18, 150)])
def test_samples_of_the_stored_logits(backend, per_row, rows, vocab_size):
    hidden, weight, bias = held_inputs(rows, vocab_size, 24)
    seed = torch.tensor([2**62 + 5, -(2**40)])
    if per_row:
        seed = torch.randint(-(2**62), 2**62, (rows, 2), generator=torch.manual_seed(1))
    options = {"temperature": 9.0, "suppress_token": vocab_size - 1 if vocab_size > 1 else -1}
    logits = hidden @ weight.t() + bias
    expected, expected_probability = reference.sample_tokens(logits, seed, **options)
    token, probability = BACKENDS[backend](hidden, weight, seed, bias, **options)
    assert torch.equal(token, expected)
    assert_close(probability, expected_probability, 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_greedy_is_top1(backend):
    hidden, weight, bias = held_inputs(4, 150, 24)
    greedy = BACKENDS[backend](hidden, weight, torch.tensor([1, 2]), bias, temperature=0.0)
    expected = dmax_kernels.linear_top1_confidence(hidden, weight, bias)
    assert torch.equal(greedy[0], expected[0])
    assert_close(greedy[1], expected[1], 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_rows_asked_for(backend):
    """The masked positions alone give the samples they have among all."""
    hidden, weight, _ = held_inputs(6, 150, 24)
    seed = torch.arange(12).view(6, 2)
    masked = torch.tensor([True, False, False, True, False, True])
    op = BACKENDS[backend]
    everything, _ = op(hidden, weight, seed)
    some, _ = op(hidden[masked], weight, seed[masked])
    assert torch.equal(some, everything[masked])


def test_distribution():
    """chi-squared of 20,000 draws from 5 classes: 4 degrees of freedom, p = 1e-4 at 23.5."""
    probability = torch.tensor([0.5, 0.25, 0.15, 0.08, 0.02])
    draws = 20_000
    hidden = torch.ones(draws, 1)
    token, reported = dmax_kernels.linear_sample_tokens(
        hidden, probability.log()[:, None], torch.tensor([17, 1])
    )
    counts = torch.bincount(token, minlength=5)
    chi_squared = ((counts - draws * probability).square() / (draws * probability)).sum()
    assert chi_squared < 23.5
    assert_close(reported, probability[token], 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_undefined_rows(backend):
    weight = torch.zeros(300, 1)
    weight[140] = torch.inf
    for value, expected in ((torch.inf, 140), (torch.nan, 140)):
        weight[140] = value
        token, probability = BACKENDS[backend](torch.ones(1, 1), weight, torch.tensor([1, 2]))
        assert token.tolist() == [expected]
        assert probability.isnan().all()
    token, probability = BACKENDS[backend](
        torch.ones(1, 1), torch.full((300, 1), -torch.inf), torch.tensor([1, 2])
    )
    assert token.tolist() == [0]
    assert probability.isnan().all()
