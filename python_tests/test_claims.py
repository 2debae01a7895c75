"""The paper's claims: what each test makes of its figures, and the record of the ladder."""

import json
from dataclasses import replace

import numpy as np
import pytest

from dmax_kernels.evaluation.cells import Cell, Outcome
from dmax_kernels.evaluation.metrics import aup, paired
from dmax_kernels.ring_walk import claims, evaluate, judging, record, tables
from dmax_kernels.ring_walk.claims import CLAIMS, oput
from dmax_kernels.ring_walk.evaluate import MEASURES
from dmax_kernels.ring_walk.judging import (
    FAILS,
    HOLDS,
    UNDECIDED,
    Collapses,
    Faster,
    Keeps,
    LargerArea,
    More,
    NotFaster,
)

N = 400
ONE, OTHER = Cell("oput", "spd", 0.5), Cell("base", "threshold", 0.95)


def outcome(share, rate, n=N):
    """The first of the problems are right; every one takes 100 tokens and an eos."""
    right = [i < share * n for i in range(n)]
    passes = max(1, round(100 / rate))
    return Outcome(
        right={measure: list(right) for measure in MEASURES},
        tokens=[101] * n,
        complete=[True] * n,
        forwards=[passes] * n,
        blocks=[2] * n,
        seconds=1.0,
    )


# (share right, tokens per forward) of each rule at its thresholds: a world in which the paper holds
PAPERS_WORLD = {
    ("base", "threshold"): ((0.95, 2), (0.85, 2.5), (0.60, 4), (0.01, 25)),
    ("base", "hierarchical"): ((0.94, 2.5), (0.84, 3), (0.60, 4), (0.01, 25)),
    ("base", "spd"): ((0.0, 1), (0.0, 1), (0.0, 1)),
    ("control", "threshold"): ((0.95, 2.5), (0.85, 3), (0.60, 5), (0.01, 25)),
    ("control", "spd"): ((0.0, 1), (0.0, 1), (0.0, 1)),
    ("certainty", "threshold"): ((0.95, 3), (0.88, 4), (0.60, 5), (0.01, 25)),
    ("uniform", "uniform"): ((0.70, 2.5),),
    ("uniform", "spd"): ((0.70, 2), (0.60, 2.5), (0.5, 3), (0.4, 4)),
    ("oput", "threshold"): ((0.95, 3), (0.85, 4), (0.50, 5), (0.01, 25)),
    ("oput", "hard"): ((0.95, 3), (0.86, 5), (0.70, 6)),
    ("oput", "hard_prefix"): ((0.95, 3), (0.90, 5), (0.70, 6)),
    ("oput", "hybrid"): ((0.95, 3), (0.91, 6), (0.94, 7)),
    ("oput", "spd"): ((0.97, 3.3), (0.96, 5), (0.95, 6.25), (0.94, 7)),
}


def papers_world(changes=()):
    changes = dict(changes)
    outcomes = {}
    for (model, rule), figures in PAPERS_WORLD.items():
        taus = evaluate.DECODINGS[model][rule]
        for tau, (share, rate) in zip(taus, figures, strict=True):
            cell = Cell(model, rule, tau)
            outcomes[cell] = outcome(*changes.get(cell, (share, rate)))
    for criterion, rate in (("consistency", 5.5), ("confidence", 2)):
        cell = replace(claims.DMAX, convergence=criterion)
        outcomes[cell] = outcome(*changes.get(cell, (0.95, rate)))
    return outcomes


def test_every_claim_holds_in_the_papers_world():
    outcomes = papers_world()
    assert set(outcomes) == set(evaluate.all_cells())
    for measure in MEASURES:
        judged = claims.judge_all(outcomes, measure)
        assert [(c.text, v) for c, v, _ in judged if v != HOLDS] == []


# For each claim, a cell whose figures take it away
TAKEN_AWAY = [
    (claims.DMAX, (0.90, 6.25)),
    (claims.DMAX, (0.95, 3.5)),
    (claims.HIERARCHICAL, (0.94, 10)),
    (Cell("certainty", "threshold", 0.8), (0.95, 20)),
    (claims.HIERARCHICAL, (0.94, 1.9)),
    (claims.CERTAINTY, (0.90, 3)),
    (claims.UNIFORM, (0.95, 2.5)),
    (claims.UNIFORM, (0.70, 4)),
    (oput("spd", 0.95), (0.95, 3.3)),
    (oput("spd", 0.95), (0.97, 1.5)),
    (Cell("base", "threshold", 0.5), (0.95, 4)),
    (Cell("base", "spd", 0.0), (0.60, 1)),
    (oput("hard", 0.0), (0.01, 6)),
    (oput("hard_prefix", 0.5), (0.86, 5)),
    (oput("hybrid", 0.5), (0.86, 6)),
    (oput("hybrid", 0.0), (0.70, 7)),
    (oput("hybrid", 0.5), (0.95, 6)),
    (oput("spd", 0.0), (0.85, 7)),
    (replace(claims.DMAX, convergence="confidence"), (0.99, 2)),
    (replace(claims.DMAX, convergence="consistency"), (0.95, 7)),
    (oput("spd", 0.0), (0.01, 7)),
    (Cell("control", "threshold", 0.8), (0.95, 20)),
    (oput("threshold", 0.8), (0.95, 20)),
    (oput("hard", 0.5), (0.50, 5)),
    (Cell("control", "spd", 0.5), (0.60, 1)),
]


@pytest.mark.parametrize("number", range(len(CLAIMS)))
def test_a_claim_that_its_figures_take_away_fails(number):
    assert len(TAKEN_AWAY) == len(CLAIMS)
    cell, figures = TAKEN_AWAY[number]
    verdict, judged = CLAIMS[number].judge(papers_world({cell: figures}), "answer")
    assert verdict == FAILS, (CLAIMS[number].text, judged)


@pytest.mark.parametrize(
    ("test", "shares", "verdict"),
    [
        (More(ONE, OTHER), (0.95, 0.90), HOLDS),
        (More(ONE, OTHER), (0.90, 0.90), FAILS),  # a point more is excluded
        (More(ONE, OTHER), (0.80, 0.90), FAILS),
        (Keeps(ONE, OTHER), (0.90, 0.90), HOLDS),
        (Keeps(ONE, OTHER), (0.85, 0.90), FAILS),
        (Keeps(ONE, OTHER), (0.88, 0.90), UNDECIDED),
        (Keeps(ONE, OTHER, margin=9), (0.85, 0.90), HOLDS),
        (Collapses(ONE, OTHER), (0.30, 0.90), HOLDS),
        (Collapses(ONE, OTHER), (0.60, 0.90), FAILS),
        (Collapses(ONE, OTHER), (0.45, 0.90), UNDECIDED),
    ],
)
def test_shares(test, shares, verdict):
    outcomes = {ONE: outcome(shares[0], 4), OTHER: outcome(shares[1], 2)}
    judged = test.judge(outcomes, "answer")
    assert judged.verdict == verdict
    assert judged.low <= judged.value <= judged.high
    if judged.unit == "points":
        change = paired(*(outcomes[cell].right["answer"] for cell in (ONE, OTHER)))
        assert judged.value == pytest.approx(100 * change.difference)


def test_scattered_figures_are_undecided():
    """Fifty problems, of which each row gets some that the other misses."""
    one, other = outcome(0.9, 4, 50), outcome(0.9, 2, 50)
    one.right["answer"] = one.right["answer"][::-1]
    assert More(ONE, OTHER).judge({ONE: one, OTHER: other}, "answer").verdict == UNDECIDED


def test_rates():
    outcomes = {ONE: outcome(0.9, 4), OTHER: outcome(0.9, 2)}
    assert str(Faster(ONE, OTHER).judge(outcomes, "answer")) == "2.00 [2.00, 2.00] x"
    for factor, faster, not_faster in ((1.9, HOLDS, FAILS), (2.1, FAILS, HOLDS)):
        assert Faster(ONE, OTHER, factor).judge(outcomes, "answer").verdict == faster
        assert NotFaster(ONE, OTHER, factor).judge(outcomes, "answer").verdict == not_faster
    spread = outcome(0.9, 2)
    spread.forwards = [20, 180] * (N // 2)
    judged = Faster(OTHER, ONE, 1.0).judge({ONE: outcomes[ONE], OTHER: spread}, "answer")
    ratio = np.mean([100 / 20, 100 / 180]) / 4
    assert judged.value == pytest.approx(ratio)
    assert judged.low < ratio < judged.high


def test_areas_are_those_of_the_metric():
    outcomes = papers_world()
    areas = judging.drawn_areas(outcomes, "answer")
    assert set(areas) == set(judging.AREAS)
    best = max(100 * o.share("answer") for c, o in outcomes.items() if (c.model, c.rule) in areas)
    for (model, rule), drawn in areas.items():
        cells = [c for c in outcomes if (c.model, c.rule) == (model, rule) and judging.is_plain(c)]
        rates = [outcomes[cell].tokens_per_forward(count_eos=False) for cell in cells]
        shares = [100 * outcomes[cell].share("answer") for cell in cells]
        assert drawn[0] == pytest.approx(aup(rates, shares, best))
        assert len(drawn) == judging.DRAWS + 1
    test = LargerArea(("oput", "spd"), ("base", "threshold"))
    judged = test.judge(outcomes, "answer")
    assert judged.value == pytest.approx(areas[test.first][0] - areas[test.second][0])


def test_the_tables_hold_the_figures():
    outcomes = papers_world()
    text = tables.all_tables(outcomes)
    for number in range(1, 5):
        assert f"Table {number}" in text
    (dmax,) = (line for line in text.splitlines() if line.startswith("DMax: OPUT, SPD 0.5 "))
    assert dmax.split("|")[1].split() == ["6.25", "8.00"]
    assert dmax.split("|")[2].split()[0] == "95.0"
    change = paired(*(outcomes[cell].right["answer"] for cell in (claims.DMAX, claims.BASE)))
    low, high = 100 * change.low, 100 * change.high
    assert f"+0.0 [{low:+.1f}, {high:+.1f}]" in dmax
    assert len([line for line in text.splitlines() if line.startswith("  x x x")]) == 3


def test_the_findings_say_what_fails():
    words = tables.findings(papers_world({claims.DMAX: (0.90, 6.25)}))
    first = words[: words.index(" 2. ")]
    assert " 1. Table 1: DMax (tau 0.5) keeps the base model's accuracy." in first
    assert "both FAILS: -5.0 [" in first
    assert " 3. " in words
    assert "both holds: 2.50 [2.50, 2.50] x; 2.06" in words


@pytest.fixture(scope="module")
def shipped():
    return record.shipped_record()


def test_the_shipped_record_follows_from_its_own_figures(shipped):
    """Verdicts are those of the tests of today's claims."""
    assert shipped["problems"] >= 500
    assert shipped["claims"] == [f"{claim.where}: {claim.text}" for claim in CLAIMS]
    for each in shipped["judged"]:
        for claim, judged in zip(CLAIMS, each["claims"], strict=True):
            verdicts = {test["verdict"] for test in judged["tests"]}
            worst = FAILS if FAILS in verdicts else UNDECIDED if UNDECIDED in verdicts else HOLDS
            assert judged["verdict"] == worst
            for test, found in zip(claim.tests, judged["tests"], strict=True):
                if isinstance(test, More):
                    wanted = judging.above(found["low"], found["high"], 0, judging.NOTHING)
                    assert found["verdict"] == wanted


def test_the_shipped_record_is_complete(shipped):
    lengths = {(each["steps"], each["seed"]) for each in shipped["judged"]}
    assert {steps for steps, _ in lengths} == {100, 200, 400, 600}
    for steps in (200, 600):
        assert len({seed for length, seed in lengths if length == steps}) == 3
    arms = {row["arm"] for row in shipped["rows"]}
    assert arms == {"base", *shipped["arms"]}
    text = json.dumps(shipped)
    assert "/work" not in text
    assert "/tmp" not in text


def test_the_ladders_picture_and_table(shipped, tmp_path):
    from dmax_kernels.ring_walk.picture import EFFECTS, write_ladder

    assert set(EFFECTS.values()) <= {claim.text for claim in CLAIMS}
    write_ladder(shipped, tmp_path / "ladder.png")
    assert (tmp_path / "ladder.png").read_bytes().startswith(b"\x89PNG")
    lines = tables.ladder_table(shipped).splitlines()
    assert len(lines) == 2 + len(CLAIMS)
    assert lines[0].split()[1:3] == ["100a", "200a"]
