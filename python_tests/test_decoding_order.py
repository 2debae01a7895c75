"""How left-to-right a decoding was: ARness, and the picture of position against step."""

import math
import random
from itertools import permutations

import pytest
from decoding_models import RandomModel, random_prompts
from hypothesis import given, settings
from hypothesis import strategies as st

from dmax_kernels.decoding import spd_generate
from dmax_kernels.decoding.extra import (
    arness,
    commit_order,
    commit_steps,
    fair_arness,
    global_arness,
    local_arness,
    write_order_picture,
)

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
def test_arness_by_hand(order, k, expected_global, expected_local):
    assert global_arness(order, k) == pytest.approx(expected_global)
    assert local_arness(order, k) == pytest.approx(expected_local)


@settings(max_examples=200, deadline=None)
@given(orders, st.integers(1, 6))
def test_arness_is_its_definition(order, k):
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


steps_of_an_order = orders.flatmap(
    lambda order: st.lists(st.booleans(), min_size=len(order), max_size=len(order)).map(
        lambda cuts: cut_into_steps(order, cuts)
    )
)


def cut_into_steps(order, cuts):
    """Consecutive commits are one step where a cut is False."""
    steps = []
    for position, cut in zip(order, cuts, strict=True):
        if cut or not steps or len(steps[-1]) == 4:  # few enough to try all of their orders
            steps.append([])
        steps[-1].append(position)
    return steps


@settings(max_examples=60, deadline=None)
@given(steps_of_an_order, st.integers(1, 5))
def test_fair_arness_is_the_mean_over_all_orders_of_each_step(steps, k):
    """Steps are averaged one by one: what is masked before a step depends on no order."""
    count, hits = sum(map(len, steps)), 0.0
    masked = {position for step in steps for position in step}
    for step in steps:
        tried = list(permutations(step))
        for order in tried:
            left = set(masked)
            for position in order:
                hits += (position in sorted(left)[:k]) / len(tried)
                left.remove(position)
        masked -= set(step)
    actual = fair_arness(steps, k)
    assert actual == pytest.approx(hits / count) if count else math.isnan(actual)
    singly = [[position] for step in steps for position in step]
    order = [position for step in steps for position in step]
    if count:
        assert fair_arness(singly, k) == global_arness(order, k)
        assert actual <= global_arness([p for step in steps for p in sorted(step)], k) + 1e-12


@pytest.mark.parametrize(
    ("steps", "k", "expected"),
    [
        ([range(4)], 1, (1 + 1 / 2 + 1 / 3 + 1 / 4) / 4),  # a block in one step
        ([range(4)], 2, (1 + 1 + 2 / 3 + 2 / 4) / 4),
        ([[0, 1], [2, 3]], 1, 3 / 4),  # two at a time, from left to right
        ([[2, 3], [0, 1]], 1, (0 + 0 + 1 + 1 / 2) / 4),
        ([[0, 2], [], [1, 3]], 1, (1 + 0 + 1 + 1 / 2) / 4),
    ],
)
def test_fair_arness_by_hand(steps, k, expected):
    assert fair_arness(steps, k) == pytest.approx(expected)


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
    steps = [[5], [], [6, 7], [10, 11], [8, 9]]
    assert commit_steps(TRACE["rows"][0]) == steps
    assert commit_steps(TRACE["rows"][0], end=10) == [[5], [], [6, 7], [], [8, 9]]
    one_step = (1 + 1 / 2 + 1 / 3 + 1 / 4) / 4
    assert arness(TRACE, ties="fair") == pytest.approx([fair_arness(steps), one_step])
    assert arness(TRACE, ties="fair", ends=[6, 8]) == pytest.approx([1, one_step])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: global_arness([0, 1], 0), "global_arness: k must be a positive integer, got 0"),
        (lambda: local_arness([0, 0]), r"local_arness: order must name each position once, got"),
        (lambda: arness(TRACE, scope="near"), "scope must be one of 'global', 'local', got 'near'"),
        (
            lambda: arness(TRACE, ties="all"),
            "ties must be one of 'left', 'fair' with scope 'global'",
        ),
        (
            lambda: arness(TRACE, scope="local", ties="fair"),
            "ties must be one of 'left' with scope 'local', got 'fair'",
        ),
        (lambda: fair_arness([[0], [1, 0]]), "fair_arness: order must name each position once"),
        (lambda: fair_arness([[0]], 0), "fair_arness: k must be a positive integer, got 0"),
        (lambda: arness(TRACE, ends=[1]), "ends must be one position for each of 2 rows, got 1"),
    ],
)
def test_mistakes_about_an_order_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_picture_has_a_dot_for_each_commit(tmp_path, monkeypatch):
    """Two decodings of the same prompts: their dots are the trace's commits, by step."""
    from matplotlib.axes import Axes

    drawn = []
    monkeypatch.setattr(
        Axes, "scatter", lambda self, x, y, **_: drawn.append(list(zip(x, y, strict=True)))
    )
    traces = {
        rule: spd_generate(
            RandomModel(),
            random_prompts(2, 8),
            rule=rule,
            block_length=8,
            max_new_tokens=16,
            eos_token_id=(),
            trace=True,
        ).trace
        for rule in ("autoregressive", "random")
    }
    traces["written"] = TRACE
    path = tmp_path / "order.png"
    write_order_picture(traces, path, row=1, end=30)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert drawn[0] == [(i + 1, i) for i in range(16)]  # a diagonal over two blocks
    assert sorted(y for _, y in drawn[1]) == list(range(16))
    assert drawn[1] != drawn[0]
    assert drawn[2] == [(1, i) for i in range(4)]
    drawn.clear()
    write_order_picture({"cut": TRACE}, path, end=10)
    assert drawn == [[(1, 0), (3, 1), (3, 2), (5, 3), (5, 4)]]


@pytest.mark.parametrize(
    ("traces", "row", "message"),
    [
        ({}, 0, "write_order_picture: traces must be at least one trace, got none"),
        ({"a": TRACE}, 2, "row must be a row of the trace 'a', which has 2, got 2"),
        ({"a": TRACE}, -1, "row must be a row of the trace 'a', which has 2, got -1"),
    ],
)
def test_mistakes_about_a_picture_are_named(traces, row, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        write_order_picture(traces, tmp_path / "order.png", row=row)
    assert not list(tmp_path.iterdir())
