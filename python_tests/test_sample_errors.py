"""The options of sample_tokens and linear_sample_tokens that are refused, one by one."""

import pytest
import torch

import dmax_kernels

SEED = torch.tensor([1, 2])
NAN = float("nan")
X, ROWS = torch.ones(2, 3), torch.ones(2, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, r"temperature must be 0 \(greedy\), or at least 1e-30 .*, got -1"),
        ({"temperature": 1e-31}, "temperature must be .*, got 1e-31"),
        ({"temperature": NAN}, "temperature must be .*, got nan"),
        ({"top_k": -1}, r"top_k must be 0 \(off\) or a whole number of tokens, got -1"),
        ({"top_p": 0.0}, r"top_p must be above 0 and at most 1 \(off\), got 0"),
        ({"top_p": 1.5}, "top_p must be .*, got 1.5"),
        ({"top_p": NAN}, "top_p must be .*, got nan"),
        ({"min_p": -0.1}, r"min_p must be at least 0 \(off\) and at most 1, got -0.1"),
        ({"min_p": 1.1}, "min_p must be .*, got 1.1"),
        ({"suppress_token": 3}, "suppress_token must be .* below 3, got 3"),
        ({"row_options": ROWS, "top_k": 2}, "with row_options, .* defaults, got 1, 2, 1 and 0"),
        ({"row_options": ROWS[:1]}, r"row_options must have shape \[2, 4\] .*, got \[1, 4\]"),
        ({"row_options": ROWS.double()}, "row_options must be float32, got float64"),
        ({"row_options": ROWS * -1}, "temperature must be .*, got -1 in row 0"),
        ({"row_options": ROWS * torch.tensor([[1], [1.5]])}, "top_k must be .*, got 1.5 in row 1"),
        ({"allowed": torch.ones(2, 2).int()}, r"allowed must have shape \[2, 1\] .*, got \[2, 2\]"),
        ({"allowed": torch.ones(3, 1).int()}, r"allowed must have shape \[2, 1\]"),
        ({"allowed": torch.ones(2, 1).long()}, "allowed must be int32, got int64"),
    ],
)
def test_refused(options, message):
    with pytest.raises(RuntimeError, match=f"^sample_tokens: {message}"):
        torch.ops.dmax.sample_tokens(X, SEED, **options)
    with pytest.raises(RuntimeError, match=f"^linear_sample_tokens: {message}"):
        torch.ops.dmax.linear_sample_tokens(torch.ones(2, 5), torch.ones(3, 5), SEED, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"suppress_tokens": (1, 3)}, r"suppress_tokens must be token ids in \[0, 3\), got 3"),
        ({"suppress_tokens": (-1,)}, "suppress_tokens must be .*, got -1"),
        ({"vocab_limit": 0}, "vocab_limit must be in 1..V = 3, got 0"),
        ({"vocab_limit": 4}, "vocab_limit must be in 1..V = 3, got 4"),
        (
            {"top_p": torch.ones(3)},
            r"top_p must be a number or a tensor \[2\] on cpu, .*, got \[3\]",
        ),
    ],
)
def test_refused_by_the_public_functions(options, message):
    with pytest.raises(ValueError, match=f"^sample_tokens: {message}"):
        dmax_kernels.sample_tokens(X, SEED, **options)
    with pytest.raises(ValueError, match=f"^linear_sample_tokens: {message}"):
        dmax_kernels.linear_sample_tokens(torch.ones(2, 5), torch.ones(3, 5), SEED, **options)


def test_more_ids_than_there_are_counters():
    """Nothing of this size is stored: the row is one number."""
    logits = torch.zeros(1).expand(2**31 + 1)
    with pytest.raises(RuntimeError, match="^sample_tokens: V must be at most 2147483648, .*, got"):
        dmax_kernels.sample_tokens(logits, SEED)


def test_the_limits_of_the_options_are_allowed_per_row():
    edges = torch.tensor([[1e-30, 0, 1, 0], [1e30, 3, 1e-30, 1], [0, 2.0**24, 1, 1]])
    sample = torch.ops.dmax.sample_tokens(torch.eye(3), SEED, row_options=edges)
    assert all(each.isfinite().all() for each in sample)
