"""Accuracy under parallelism, paired intervals, and which answers are the same."""

import math
import random

import pytest

from dmax_kernels.evaluation.cells import Outcome, Response
from dmax_kernels.evaluation.grading import Extracted, Graded, make_grade, same_answer
from dmax_kernels.evaluation.metrics import Z, aup, paired, share_interval

# d3LLM's leaderboard for GSM8K-CoT: (parallelism, accuracy) of each method, and what its own
# function gives for them (hao-ai-lab/d3LLM, AUP_leaderboard/aup_utils.py, at e5bfcac)
LEADERBOARD = {
    "LLaDA": ([(1.0, 72.55)], 72.55),
    "Fast-dLLM-LLaDA": ([(1.0, 74.79), (2.77, 74.68)], 205.7811),
    "D2F": ([(1.0, 74.98), (2.88, 74.39)], 213.7564),
    "dParallel-LLaDA": ([(1.0, 74.0), (5.14, 72.63)], 358.1422),
    "d3LLM-LLaDA": ([(1.0, 74.02), (9.11, 73.09)], 637.6549),
}


@pytest.mark.parametrize("method", LEADERBOARD)
def test_aup_is_that_of_the_leaderboard(method):
    points, expected = LEADERBOARD[method]
    best = max(y for others, _ in LEADERBOARD.values() for _, y in others)
    assert aup(*zip(*points, strict=True), best) == pytest.approx(expected, abs=5e-5)


def test_aup_of_points_in_any_order_and_with_one_that_is_too_wrong():
    # From the same function; 86 is more than 5 points below 92 and is left out of the first
    rho, y = [4.0, 1.0, 2.5, 3.0], [88.0, 92.0, 86.0, 90.5]
    assert aup(rho, y, 95.0) == pytest.approx(328.7251950095, abs=1e-6)
    assert aup(rho, y, 92.0, alpha=10.0, tolerance=8.0) == pytest.approx(291.9477749512, abs=1e-6)
    assert aup(rho, y) == aup(rho, y, 92.0)
    # d3LLM's function refuses this one; its last point only adds nothing here
    assert aup([1.0, 8.0], [90.0, 10.0]) == 90.0
    assert aup([2.0, 4.0], [0.0, 0.0]) == 0.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], []), "accuracy must be at least one point, got none"),
        (([1.0], [1.0, 2.0]), "parallelism must be of as many points as accuracy, 2, got 1"),
        (([0.0], [50.0]), "parallelism must be positive, got 0.0"),
        (([1.0], [101.0]), "accuracy must be a percentage in"),
        (([1.0], [50.0], 120.0), "best_accuracy must be in"),
    ],
)
def test_aup_refuses_what_is_no_accuracy(arguments, message):
    with pytest.raises(ValueError, match=message):
        aup(*arguments)


def test_paired_by_hand():
    """10 discordant pairs, 9 of them for the second: p = 2 (1 + 10) / 2^10."""
    first = [True] * 50 + [True] + [False] * 9 + [False] * 40
    second = [True] * 50 + [False] + [True] * 9 + [False] * 40
    result = paired(first, second)
    assert (result.only_first, result.only_second, result.problems) == (1, 9, 100)
    assert result.difference == pytest.approx(-0.08)
    assert result.p_value == pytest.approx(22 / 1024)
    half = Z * math.sqrt(1.5 + 9.5 - 64 / 102) / 102
    assert result.low == pytest.approx(-8 / 102 - half)
    assert result.high == pytest.approx(-8 / 102 + half)
    mirrored = paired(second, first)
    assert mirrored.difference == -result.difference
    assert (mirrored.low, mirrored.high) == pytest.approx((-result.high, -result.low))
    same = paired(first, first)
    assert same.p_value == 1
    assert same.low < 0 < same.high  # no pair differs, which does not make the shares equal
    assert paired(first[:50], second).problems == 50  # one that has collapsed
    with pytest.raises(ValueError, match="at least one that both rows have, got 0"):
        paired([], second)


@pytest.mark.parametrize(("rate", "both"), [(0.9, 0.85), (0.98, 0.97)])
def test_intervals_hold_the_truth_in_95_of_100_cases(rate, both):
    """400 draws of 200 problems: the coverage has a standard error of 1.1 %."""
    rng = random.Random(0)
    covered = shares = 0
    for _ in range(400):
        kinds = [rng.random() for _ in range(200)]  # both right, only the first, only the second
        first = [u < rate for u in kinds]
        second = [u < both or rate <= u < rate + 0.02 for u in kinds]
        truth = rate - both - 0.02
        interval = paired(first, second)
        covered += interval.low <= truth <= interval.high
        low, high = share_interval(sum(first), 200)
        shares += low <= rate <= high
    assert covered / 400 >= 0.92
    assert shares / 400 >= 0.92


def test_rates_count_what_they_say():
    outcome = Outcome({"answer": [True, False]}, [10, 20], [True, False], [5, 4], [1, 2])
    assert outcome.tokens_per_forward() == (2 + 5) / 2
    assert outcome.tokens_per_forward("sum") == 30 / 9
    assert outcome.tokens_per_forward(count_eos=False) == (9 / 5 + 5) / 2  # one has none
    assert outcome.tokens_per_forward("sum", count_eos=False) == 29 / 9
    assert outcome.forwards_per_block == 3
    assert outcome.share("answer") == 0.5


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("1,234", "1234.0", True),
        ("$18.", "18", True),
        ("-3", "3", False),
        (" x  + 1", "x + 1", True),
        ("yes", "no", False),
        ("nan", "NaN", False),
        (".5", "0.50", True),
    ],
)
def test_same_answers(one, other, same):
    assert same_answer(one, other) == same


def response(text):
    return Response([], True, text)


@pytest.mark.parametrize(
    ("extract", "text", "record", "right"),
    [
        (None, "first 3, so 1,042.", {"answer": "6 * 7 = 1000 #### 1042"}, True),
        (None, "no number", {"answer": 5}, False),
        (None, "it is 5 of 6", {"answer": 5}, False),
        (r"#### (\S+)", "#### 3\n#### 4 and 5", {"answer": "so #### 4"}, True),
        (r"#### (\S+)", "4", {"answer": "4"}, False),
        (r"[A-D]", "A or (C)", {"answer": "C"}, True),
        ("test_evaluation_metrics:shout", "b a", {"answer": "A"}, True),
        ("test_evaluation_metrics:shout", "", {"answer": "A"}, False),
    ],
)
def test_extracted_answers(extract, text, record, right):
    grade = make_grade(extract, None, "answer")
    assert grade(response(text), record) == {"answer": right}


def shout(text):
    """The last word in capitals."""
    return text.upper().split()[-1] if text else None


def odd(response, record):
    return {"short": len(response.text) < 3, "complete": response.complete}


def broken(response, record):
    return "yes"


def test_grades_of_a_function():
    assert make_grade(None, "test_evaluation_metrics:odd", "answer")(response("abc"), {}) == {
        "short": False,
        "complete": True,
    }
    with pytest.raises(ValueError, match="must return a bool, or a dict .* got 'yes'"):
        Graded("test_evaluation_metrics:broken")(response(""), {})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_grade("x", "a:b", "answer"), "--extract and --grade must not be given"),
        (lambda: Extracted("(", "answer"), r"--extract must be a regular expression or MODULE"),
        (lambda: Extracted("no_such_module:f"), "--extract must be MODULE:FUNCTION that can be"),
        (lambda: Graded("math:no_such"), "--grade must be MODULE:FUNCTION that can be"),
        (lambda: Graded("math:pi"), "--grade must be a function, got math:pi, a float"),
        (lambda: Graded("x"), "--grade must be MODULE:FUNCTION, got x"),
        (lambda: Extracted().wanted({"answer": None}), 'must have a text or number "answer"'),
        (lambda: Extracted().wanted({}), "the right answer, got None"),
    ],
)
def test_a_grade_that_cannot_be_made_says_so(make, message):
    with pytest.raises(ValueError, match=message):
        make()
