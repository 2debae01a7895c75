"""Global- and Local-ARness against hand-worked orders and against their definitions."""

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmax_kernels.decoding.extra import arness, commit_order, global_arness, local_arness

orders = st.integers(0, 12).flatmap(lambda n: st.permutations(range(3, 3 + n)))


@pytest.mark.parametrize(
    ("order", "k", "expected_global", "expected_local"),
    [
        ([0, 1, 2, 3], 1, 1, 1),
        ([0, 1, 2, 3], 3, 1, 1),
        ([3, 2, 1, 0], 1, 1 / 4, 0),  # the last one left is always the leftmost
        ([3, 2, 1, 0], 2, 2 / 4, 0),
        # masked before each commit: 0123, 012, 02, 2
        ([3, 1, 0, 2], 1, 2 / 4, 0),
        ([3, 1, 0, 2], 2, 3 / 4, 0),
        # pairs: 0-1 yes, 1-4 no, 4-5 yes, 5-6 yes, 6-2 no, 2-3 yes
        ([0, 1, 4, 5, 6, 2, 3], 1, 4 / 7, 4 / 6),
        # triples: 014 no, 145 no, 456 yes, 562 no, 623 no
        ([0, 1, 4, 5, 6, 2, 3], 2, 4 / 7, 1 / 5),
        ([10, 20], 1, 1, 0),  # a gap is no successor, but nothing masked lies in it
    ],
)
def test_worked_by_hand(order, k, expected_global, expected_local):
    assert global_arness(order, k) == pytest.approx(expected_global)
    assert local_arness(order, k) == pytest.approx(expected_local)


@settings(max_examples=200, deadline=None)
@given(orders, st.integers(1, 6))
def test_is_the_definition(order, k):
    masked, hits = set(order), 0
    for position in order:
        hits += position in sorted(masked)[:k]
        masked.remove(position)
    spans = [
        all(order[c - i] == order[c] - i for i in range(1, k + 1)) for c in range(k, len(order))
    ]
    for measure, right, count in (
        (global_arness, hits, len(order)),
        (local_arness, sum(spans), len(spans)),
    ):
        actual = measure(order, k)
        assert actual == pytest.approx(right / count) if count else math.isnan(actual)


def test_a_random_order_is_far_from_autoregressive():
    """Expectation of Global-ARness@1 of a random order: the harmonic mean H_L / L."""
    rng = random.Random(0)
    scores = [global_arness(rng.sample(range(32), 32)) for _ in range(500)]
    expected = sum(1 / n for n in range(1, 33)) / 32
    assert sum(scores) / len(scores) == pytest.approx(expected, abs=0.01)


TRACE = {
    "rows": [
        {
            "blocks": [
                {"start": 4, "steps": [{"promoted": [1]}, {"promoted": []}, {"promoted": [3, 2]}]},
                {"start": 8, "steps": [{"promoted": [2, 3]}, {"promoted": [0, 1]}]},
            ]
        },
        {"blocks": [{"start": 4, "steps": [{"promoted": [0, 1, 2, 3]}]}]},
    ]
}


def test_a_trace_gives_its_order_step_by_step():
    assert commit_order(TRACE["rows"][0]) == [5, 6, 7, 10, 11, 8, 9]
    assert commit_order(TRACE["rows"][0], end=10) == [5, 6, 7, 8, 9]
    assert arness(TRACE) == pytest.approx([5 / 7, 1])
    assert arness(TRACE, 2) == pytest.approx([5 / 7, 1])
    assert arness(TRACE, 3) == [1, 1]
    assert arness(TRACE, scope="local") == pytest.approx([4 / 6, 1])
    assert arness(TRACE, ends=[10, 8]) == [1, 1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: global_arness([0, 1], 0), "global_arness: k must be a positive integer, got 0"),
        (lambda: local_arness([0, 0]), r"local_arness: order must name each position once, got"),
        (lambda: arness(TRACE, scope="near"), "scope must be 'global' or 'local', got 'near'"),
        (lambda: arness(TRACE, ends=[1]), "ends must be one position for each of 2 rows, got 1"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
