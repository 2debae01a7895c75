"""What all rules share, on random blocks, and the definitions of some."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_decoding_promote import THRESHOLD, positions, promote

from dmax_kernels.decoding import (
    Autoregressive,
    EntropyBound,
    Factor,
    Hierarchical,
    LocalLeap,
    Margin,
    ParallelForced,
    Prophet,
    Random,
    SchED,
    Seen,
    TopN,
    Uniform,
)
from dmax_kernels.decoding.extra.nap import summary_last
from dmax_kernels.decoding.rule_parts import best_in_turns, rank_within
from dmax_kernels.decoding.rules import ABLATIONS

NAN = math.nan


pytestmark = pytest.mark.usefixtures("one_thread")


# Every rule with its options; "canvas" is a canvas whose slots are equal parts
def call(name, statistics, masked, option):
    tau, n = (0.0, 0.3, 0.8)[option], option + 1
    if name == "canvas":
        slots = torch.arange(masked.shape[-1], device=masked.device) * n // masked.shape[-1]
        candidates = summary_last(masked, slots == option)
        return best_in_turns(statistics["confidence"], candidates, n, slots)
    rule = {
        "threshold": THRESHOLD,
        "prefix": ABLATIONS["spd"],
        "factor": Factor(0.2 + tau),
        "hierarchical": Hierarchical(tau / 2),
        "top_n": TopN(n),
        "autoregressive": Autoregressive(n),
        "random": Random(n, option),
        "entropy_bound": EntropyBound(tau),
        "margin": Margin(),
        "uniform": Uniform(),
        "parallel_forced": ParallelForced(n, n),
        "local_leap": LocalLeap(tau / 2, n),
        "prophet": Prophet(n, early=4 * tau),
        "sched": SchED(n, schedule=("linear", "cosine", "exponential")[option], high=4, low=0),
    }[name]
    return rule.promote(Seen(masked, tau_dec=tau, **statistics))


NAMES = (
    *("threshold", "prefix", "factor", "hierarchical", "top_n", "autoregressive", "random"),
    *("entropy_bound", "margin", "uniform", "parallel_forced", "canvas"),
    *("local_leap", "prophet", "sched"),
)
# One column per position: masked, c, share of the rest that the runner-up has, entropy
columns = st.tuples(
    st.booleans(),
    st.sampled_from([0.0, 0.1, 0.3, 0.3, 0.5, 0.8, 0.9, 1.0, NAN]),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.sampled_from([0.0, 0.01, 0.1, 0.1, 0.7, 3.0]),
    st.integers(0, 20),
)


def build(rows):
    masked, c, share, entropy, token = (
        torch.tensor([[column[i] for column in row] for row in rows]) for i in range(5)
    )
    statistics = {
        "confidence": c,
        "runner_up": torch.minimum(c, share * (1 - c)),
        "entropy": torch.where(c.isnan(), NAN, entropy),
        "token": token,
        "step": torch.arange(len(rows), dtype=torch.int32) % 3,
        "editable": masked | (token % 2 == 0),
    }
    return statistics, masked


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 9).flatmap(
        lambda n: st.lists(st.lists(columns, min_size=n, max_size=n), min_size=1, max_size=4)
    ),
    st.integers(0, 2),
)
def test_promises_all_rules_share(name, rows, option):
    statistics, masked = build(rows)
    promoted = call(name, statistics, masked, option)
    assert promoted.dtype == torch.bool
    assert promoted.shape == masked.shape
    assert not (promoted & ~masked).any()
    assert torch.equal(promoted.any(dim=-1), masked.any(dim=-1))
    unknown = statistics["confidence"].isnan()
    for i in range(len(rows)):
        # A NaN moves only where it must: one position, the leftmost of those the rule looks at
        forced = positions(promoted[i] & unknown[i])
        if name in ("autoregressive", "prefix"):
            assert forced in ([], positions(masked[i])[:1])
        elif name != "canvas":
            known = masked[i] & ~unknown[i]
            assert forced == ([] if known.any() else positions(masked[i])[:1])
        # The same row alone, and among others in a different order
        alone = {key: value[i : i + 1] for key, value in statistics.items()}
        assert torch.equal(call(name, alone, masked[i : i + 1], option)[0], promoted[i])
    mirrored = {key: value.flip(0) for key, value in statistics.items()}
    assert torch.equal(call(name, mirrored, masked.flip(0), option).flip(0), promoted)


@pytest.mark.parametrize("name", NAMES)
def test_every_block_ends_after_as_many_steps_as_positions(name):
    generator = torch.Generator().manual_seed(1)
    masked = torch.rand(3, 2, 17, generator=generator) < 0.8  # any leading shape
    c = torch.rand(masked.shape, generator=generator)
    statistics = {
        "confidence": c.masked_fill(c < 0.2, NAN),
        "runner_up": (1 - c).clamp(max=c),
        "entropy": -3 * c.log(),
        "token": torch.randint(0, 50, masked.shape, generator=generator),
        "step": torch.zeros(masked.shape[:-1], dtype=torch.int32),
        "editable": masked,
    }
    for _ in range(17):
        masked = masked & ~call(name, statistics, masked, 0)
        statistics["step"] += 1
    assert not masked.any()


@settings(max_examples=100, deadline=None)
@given(st.lists(columns, min_size=1, max_size=9), st.floats(0, 2))
def test_entropy_bound_is_its_definition(row, bound):
    statistics, masked = build([row])
    entropies = statistics["entropy"][0].tolist()
    known = [j for j, column in enumerate(row) if column[0] and not math.isnan(column[1])]
    expected, before = [], torch.tensor(0.0)
    for j in sorted(known, key=lambda j: (entropies[j], j)):
        if before <= bound:
            expected.append(j)
        before = before + statistics["entropy"][0, j]
    actual = promote(EntropyBound(bound), None, masked, entropy=statistics["entropy"])[0]
    assert positions(actual) == (sorted(expected) or positions(masked[0])[:1])


@settings(max_examples=100, deadline=None)
@given(st.lists(columns, min_size=1, max_size=9), st.sampled_from([0.05, 0.4, 1.0, 2.5]))
def test_factor_takes_the_largest_n(row, factor):
    statistics, masked = build([row])
    c = statistics["confidence"][0]
    ranked = sorted(
        (j for j, column in enumerate(row) if column[0] and not math.isnan(column[1])),
        key=lambda j: (-c[j].item(), j),
    )
    sizes = [n for n, j in enumerate(ranked, start=1) if (n + 1) * (1 - c[j]) < factor]
    expected = sorted(ranked[: max(sizes, default=1)]) or positions(masked[0])[:1]
    assert positions(promote(Factor(factor), c[None], masked)[0]) == expected


@settings(max_examples=100, deadline=None)
@given(
    st.lists(columns, min_size=1, max_size=9), st.lists(st.integers(-2, 2), min_size=9, max_size=9)
)
def test_ranks_within_groups(row, groups):
    statistics, masked = build([row])
    c, group = statistics["confidence"], torch.tensor([groups[: len(row)]])
    rank = rank_within(c, masked, group)[0]

    def key(j):
        return (not row[j][0], math.isnan(row[j][1]), -c[0, j].nan_to_num().item(), j)

    for g in set(groups[: len(row)]):
        members = [j for j in range(len(row)) if groups[j] == g]
        masked_members = [j for j in sorted(members, key=key) if row[j][0]]
        assert [rank[j].item() for j in masked_members] == list(range(len(masked_members)))


@pytest.mark.parametrize("name", NAMES)
def test_no_host_sync(name):
    """On tensors without values: nothing can be read back, and no shape can depend on a value."""
    statistics, masked = build([[(True, 0.5, 0.5, 0.1, 3), (True, 0.9, 0.0, 0.01, 4)] * 3] * 2)
    statistics = {key: value.to("meta") for key, value in statistics.items()}
    promoted = call(name, statistics, masked.to("meta"), 1)
    assert promoted.is_meta
    assert promoted.shape == masked.shape
