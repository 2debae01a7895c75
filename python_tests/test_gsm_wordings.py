"""Chains of thought in many wordings, and the models that ship, which were trained on them."""

import random

import pytest
import torch

from dmax_kernels.__main__ import main
from dmax_kernels.evaluation.cells import Cell, Response
from dmax_kernels.gsm import problems, show, task
from dmax_kernels.gsm.bundle import Bundle
from dmax_kernels.gsm.wording import OPENINGS, plain, reworded

ONE = "There are 6 x 2 = 12 players.\nIn all there are 6 + 12 + 30 = 48.\n#### 48"


@pytest.fixture(scope="module")
def bundle():
    return Bundle.open(show.SHIPPED)


def test_a_text_has_many_wordings_that_mean_the_same():
    wordings = {reworded(ONE, random.Random(seed)) for seed in range(400)}
    assert len(wordings) > 300  # of 6 openings twice, 4 products and 12 sums
    for each in wordings:
        assert plain(each) == plain(ONE)
        assert each.split("\n")[-1] == "#### 48"
    assert {w.partition("here are")[0][:-1] for w in wordings} == set(OPENINGS)


def test_the_same_draws_give_the_same_wording():
    assert reworded(ONE, random.Random(3)) == reworded(ONE, random.Random(3))


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("Hence a cat ate 2 + 3 = 5 mice.", "A cat ate 5 = 3 + 2 mice."),
        ("This means that 20 = 10 * 2", "2 * 10 = 20"),
        ("In other words, £34 / 2 = $17.", "Next, $17 = £34 / 2."),
        ("16+6=22 spoons", "22=6+16 spoons"),
        ("Now we can say that she has 0.5 x 8 = 4.0 liters.", "She has 4.0 = 8 x 0.5 liters."),
    ],
)
def test_wordings_of_the_same_text(text, same):
    assert plain(text) == plain(same)


@pytest.mark.parametrize(
    ("text", "other"),
    [
        ("5 - 3 = 2", "3 - 5 = 2"),  # operands of a difference have an order
        ("5 + 3 = 8", "8 + 3 = 5"),
        ("5 + 3 = 8", "5 * 3 = 8"),
        ("5 + 3 = 8", "5 + 3 = 9"),
        ("Next, a cat.", "Next, a dog."),
        ("74 + T = 157 + T = 221", "T + 74 = 157 + T = 221"),  # no equation of numbers: left alone
        ("2 + 3 = 5 = 4 + 1", "5 = 2 + 3 = 4 + 1"),
        ("one\ntwo", "two\none"),
    ],
)
def test_texts_that_are_not_the_same(text, other):
    assert plain(text) != plain(other)


def test_every_problem_that_ships_is_told_in_some_wording_of_its_template(bundle):
    texts = [record["response"] for record in bundle.problems["test"]]
    for seed, text in enumerate(texts):
        other = reworded(plain(text), random.Random(seed))
        assert plain(other) == plain(text)
        assert plain(plain(text)) == plain(text)
    assert sum(plain(text) != text for text in texts) > len(texts) / 2


def test_a_file_with_wordings_has_the_same_problems_in_other_words(monkeypatch):
    def apples(rng, difficulty):
        one, two = rng.randint(1, 30), rng.randint(1, 30)
        cot = f"There are {one} + {two} = {one + two} apples.\n#### {one + two}"
        return {"question": f"{one} and {two}?", "metadata": {"answer_cot": cot}}

    monkeypatch.setattr(problems, "generators", lambda: {0: apples})
    counts = {"train": 40, "distill": 8, "test": 6, "new_template": 1}
    worded = problems.all_problems(counts=counts, wordings=True)
    told = {record["prompt"]: record["response"] for record in problems.all_problems(counts=counts)}
    assert all(record["answer"] == task.final_number(record["response"]) for record in worded)
    assert len({record["response"].partition(" ")[0] for record in worded}) > 3
    common = [record for record in worded if record["prompt"] in told]
    assert common
    for record in common:
        assert plain(record["response"]) == plain(told[record["prompt"]])
        response = Response([], True, record["response"])
        assert task.grade(response, {**record, "response": told[record["prompt"]]})["strict"]


def test_the_models_that_ship(bundle):
    """Lossless: the float16 files are what was measured. Their base needs its high threshold."""
    assert bundle.names == ["base", "certainty", "oput"]
    assert bundle.model("base").num_parameters() < 1_000_000
    records = bundle.problems["test"][:64]
    shares = {}
    for cell in (Cell("base", "threshold", 0.95), Cell("base", "threshold", 0.0)):
        outcome = show.decode_cell(bundle, records, cell, "fused")
        shares[cell.tau_dec] = outcome.share("answer")
    # 89 % and 8 % of 384, recorded on another machine
    assert shares[0.95] > 0.75
    assert shares[0.0] < 0.25


def test_the_demo_needs_no_checkpoints(tmp_path, capsys):
    with torch.random.fork_rng(devices=[]):
        arguments = ["--task", "gsm", "--problems", "4", "--output-dir", str(tmp_path)]
        assert main(["demo", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "4 held-out problems of 4 templates" in printed
    for name in ("oput", "base", "certainty"):
        assert f" {name} " in printed
    page = (tmp_path / show.PAGE).read_text()
    assert "certainty, threshold" in page
