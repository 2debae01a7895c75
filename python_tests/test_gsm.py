"""The word problems: their file, their tokens and grade, and the whole recipe in small."""

import random
import re
import sys
from dataclasses import replace

import pytest
import torch

from dmax_kernels.__main__ import main
from dmax_kernels.evaluation.cells import Cell, Outcome, Response
from dmax_kernels.gsm import claims, command, problems, recipe, report, show, task
from dmax_kernels.gsm.bundle import Bundle
from dmax_kernels.gsm.place import Place
from dmax_kernels.gsm.rows import ROWS, Row, append_row, read_rows, spread_over_templates
from dmax_kernels.gsm.stages import Recipe
from dmax_kernels.training.distill import Answer
from dmax_kernels.training.outputs import Metrics


def apples(rng, difficulty):
    """A template of the form in which reasoning-gym has them."""
    name, one, two = rng.choice(["Ann", "Bob's cat"]), rng.randint(1, 30), rng.randint(1, 30)
    cot = f"{name} has {one} + {two} = {one + two} apples.\nSo it's {one + two}.\n#### {one + two}"
    question = f"{name} has {one} apples, and gets {two}. How many (in all)?"
    return {"question": question, "metadata": {"answer_cot": cot}}


def few(rng, difficulty):
    number = rng.randint(1, 9)
    cot = f"{number} - 1 = {number - 1}\n#### {number - 1}"
    return {"question": f"Take 1 from {number}", "metadata": {"answer_cot": cot}}


def long(rng, difficulty):
    return {"question": "why " * 200, "metadata": {"answer_cot": "#### 1"}}


@pytest.fixture
def records(monkeypatch):
    made = {0: apples, 3: few, 7: long, 8: apples}
    monkeypatch.setattr(problems, "generators", lambda: made)
    monkeypatch.setattr(problems, "NEW_TEMPLATE_ONE_IN", 4)
    counts = {"train": 40, "distill": 8, "test": 6, "new_template": 5}
    monkeypatch.setattr(problems, "COUNTS", counts)
    return problems.all_problems()


def test_problems_are_split_by_template_and_numbers(records):
    by_split = {name: [r for r in records if r["split"] == name] for name in task.SPLITS}
    assert {r["template"] for r in by_split["new_template"]} == {8}
    assert {r["template"] for r in records} == {0, 3, 8}  # 7 does not fit
    assert len({r["prompt"] for r in records if r["template"] != 8}) == len(records) - 5

    def numbers(record):
        return record["template"], *(c for c in record["prompt"].split() if c.strip(".,").isdigit())

    training = {numbers(r) for name in ("train", "distill") for r in by_split[name]}
    assert training.isdisjoint(map(numbers, by_split["test"]))
    assert len([r for r in by_split["train"] if r["template"] == 0]) == 40
    assert records == problems.all_problems()  # the same each time


@pytest.mark.parametrize("name", ["p.jsonl", "p.jsonl.gz"])
def test_the_file_is_read_as_it_was_written(records, tmp_path, name):
    problems.write_problems(tmp_path / name, records)
    splits = task.read_problems(tmp_path / name)
    assert [r | {"split": s} for s in task.SPLITS for r in splits[s]] == [
        r for s in task.SPLITS for r in records if r["split"] == s
    ]


@pytest.mark.parametrize("line", ["{", "[]", "3", '{"split": "test"}', '{"split": "more"}'])
def test_a_line_that_is_no_record_is_refused(tmp_path, line):
    path = tmp_path / "p.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(ValueError, match=r"--data .*p\.jsonl:1 must hold records"):
        task.read_problems(path)


def test_words_are_those_of_the_tokenizer_and_give_the_text_back(records):
    texts = [r[name] for r in records for name in ("prompt", "response")]
    texts += ["1,234.5% of $20 (it's #### -3)\n\tend", "a  b\n\nc"]
    words = task.words_of(texts)
    tokenizer, vocabulary = task.build_tokenizer(words), task.Words.of(words)
    for text in texts:
        ids = vocabulary.encode(text)
        assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
        assert task.UNK_ID not in ids
        assert tokenizer.decode(ids) == text
    assert vocabulary.encode("zebra") == [task.UNK_ID]
    prompt = vocabulary.prompt(records[0])
    assert len(prompt) % task.BLOCK == 0
    assert prompt[0] == task.PAD_ID
    response = vocabulary.response(records[0])
    assert tokenizer.decode(response, skip_special_tokens=True) == records[0]["response"]


@pytest.mark.parametrize(
    ("text", "complete", "answer", "strict"),
    [
        ("1 + 1 = 2\n#### 2", True, True, True),
        ("1 + 1 = 2\n#### 2", False, True, False),
        ("1 + 1 = 3\n#### 2", True, True, False),
        ("1 + 1 = 2\n#### 2.0", True, True, False),
        ("#### 2\n#### 3", True, False, False),
        ("the answer is 2", True, False, False),
        ("####", True, False, False),
    ],
)
def test_a_grade_is_by_the_final_number(text, complete, answer, strict):
    record = {"answer": "2", "response": "1 + 1 = 2\n#### 2"}
    assert task.grade(Response([], complete, text), record) == {"answer": answer, "strict": strict}


def test_rows_survive_a_line_that_was_cut_short(tmp_path):
    outcome = Outcome({"answer": [True]}, [3], [True], [2], [1], ["text"])
    row = Row("test", Cell("oput", "spd", 0.5), outcome)
    append_row(tmp_path / ROWS, row)
    (tmp_path / ROWS).write_bytes((tmp_path / ROWS).read_bytes() + b'{"split": "te')
    assert read_rows(tmp_path / ROWS) == [replace(row, outcome=replace(outcome, texts=[]))]
    assert read_rows(tmp_path / "none") == []


def test_problems_are_spread_over_templates():
    records = [
        {"template": t, "n": n} for t, count in ((1, 3), (2, 1), (3, 2)) for n in range(count)
    ]
    chosen = spread_over_templates(records, 5)
    assert [(r["template"], r["n"]) for r in chosen] == [(1, 0), (2, 0), (3, 0), (1, 1), (3, 1)]


@pytest.fixture
def place(records, tmp_path, monkeypatch):
    """The recipe in small: one layer, two steps a stage, one block of answer, one thread."""
    monkeypatch.setattr(task, "MAX_NEW_TOKENS", task.BLOCK)
    monkeypatch.setattr(Metrics, "draw", lambda metrics: None)  # a second for each stage
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    problems.write_problems(tmp_path / "problems.jsonl", records)
    whole = Recipe()

    def small(stages):
        return tuple(
            replace(s, config=replace(s.config, steps=2, batch_size=4, warmup_steps=1))
            for s in stages
        )

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    parts = replace(
        whole,
        sizes={**sizes, "intermediate_size": 32},
        bases=small(whole.bases),
        arms=small(whole.arms),
        distill_problems=4,
        learnt=0.0,
        measured=2,
        cells={name: cells[:2] for name, cells in whole.cells.items()},
    )
    output = tmp_path / "run"
    yield Place(tmp_path / "problems.jsonl", output, output / "export", "cpu", "reference", parts)
    torch.set_num_threads(threads)


def test_the_recipe_trains_exports_measures_and_resumes(place, monkeypatch, capsys):
    monkeypatch.setattr(recipe, "learnt_templates", lambda place, answers: [0, 3])
    # An untrained model ends no answer: the file's own responses stand for its complete ones
    monkeypatch.setattr(
        recipe, "distilled_examples", lambda p, *rest: p.examples(p.splits["distill"])
    )
    log = recipe.run_recipe(place, workers=1, threads=1)
    assert set(log["stages"]) == {"base_block16", "base", "oput", "control", "uniform", "certainty"}
    assert log["distillation"]["answered"] == 4
    rows = read_rows(place.export / ROWS)
    assert len(rows) == 2 * 5 + 2
    assert {row.split for row in rows} == {"test", "new_template"}
    assert all(row.outcome.problems == 2 for row in rows)

    bundle = Bundle.open(place.export)
    assert bundle.names == ["base", "certainty", "control", "oput", "uniform"]
    exact, half = place.weights("oput"), bundle.model("oput").state_dict()
    assert all((half[name] == value.half()).all() for name, value in exact.items())
    measured = place.model("oput").state_dict()
    assert all((half[name] == value).all() for name, value in measured.items())

    def no_step(*args):
        raise AssertionError("a finished stage must not be trained again")

    monkeypatch.setattr("dmax_kernels.training.loop.Trainer.step", no_step)
    again = recipe.run_recipe(place, workers=1, threads=1)
    assert again["stages"]["oput"]["final_loss"] == log["stages"]["oput"]["final_loss"]
    assert read_rows(place.export / ROWS) == rows

    page = report.as_page(place.export)
    assert [len(table["rows"]) for table in page["tables"]] == [10, 2]
    note = page["tables"][0]["note"]
    assert re.search(r"right, or the best 2, since fewer do\. They are 0 \(\d+%\), 3 ", note), note
    shares = {"distillation": {"share_right": {"0": 0.9, "3": 1.0, "8": 0.0}}}
    assert "2 of the 3 templates" in report.narrowing(bundle, shares)
    assert "right. They are 0 (90%), 3 (100%)." in report.narrowing(bundle, shares)
    assert {claim["verdict"] for claim in page["claims"]} <= {
        "holds",
        "fails",
        "undecided",
        "not run",
    }
    capsys.readouterr()
    folder = str(place.export)
    args = ["demo", "--task", "gsm", "--checkpoints", folder, "--problems", "1"]
    assert main([*args, "--output-dir", folder]) == 0
    assert "1 held-out problems of 2 templates" in capsys.readouterr().out
    html = (place.export / show.PAGE).read_text()
    assert '"oput, spd, \\u03c4 0.5"' in html
    assert '"#### "' not in html


def test_a_base_model_that_completes_no_answer_is_an_error(place, monkeypatch):
    monkeypatch.setattr(recipe, "distilled_examples", lambda *args: [])
    with pytest.raises(ValueError, match="must complete some of its 4 answers .* got none"):
        recipe.run_recipe(place, workers=1, threads=1)


def test_learnt_templates_and_their_complete_answers_are_what_is_distilled(place):
    place = replace(place, recipe=replace(place.recipe, learnt=0.8, least=1))
    asked = place.splits["distill"]
    answers = []
    for i, record in enumerate(asked):
        ids = place.vocabulary.response(record)
        wrong = record["template"] == 3 or i == len(asked) - 1
        complete = record["template"] == 3 or i % 2 == 0
        kept = ids if not wrong else place.vocabulary.encode("#### 99")
        answers.append(Answer(i, complete, kept, len(kept), 1, 0.0))
    shares = recipe.shares_right(place, answers)
    learnt = recipe.learnt_templates(place, answers)
    assert shares[3] == 0
    assert learnt == [0]
    every = replace(place, recipe=replace(place.recipe, least=9))
    assert recipe.learnt_templates(every, answers) == [0, 3]
    found = recipe.distilled_examples(place, answers, learnt)
    wanted = [i for i, r in enumerate(asked) if r["template"] == 0 and i % 2 == 0]
    assert [list(each.response) for each in found] == [answers[i].response for i in wanted]
    test = recipe.measured_problems(place, "test", learnt)
    assert {record["template"] for record in test} == {0}


def test_a_base_model_that_is_given_goes_on_or_stays_as_it_is(place, monkeypatch):
    monkeypatch.setattr(recipe, "run_tasks", lambda *args, **options: [])  # no arms
    recipe.run_recipe(place, workers=1, threads=1)
    given = Bundle.open(place.export).model("base").state_dict()

    def run_from(folder, steps):
        plan = place.recipe.continued(steps)
        short = [replace(s, config=replace(s.config, batch_size=4)) for s in plan.bases]
        new = replace(place, output=folder, export=folder, base=place.export)
        new = replace(new, recipe=replace(plan, bases=tuple(short)))
        log = recipe.run_recipe(new, workers=1, threads=1)
        return log, new.model("base").state_dict()

    log, same = run_from(place.output / "same", 0)
    assert log["stages"] == {}
    assert all((same[name] == value).all() for name, value in given.items())
    log, more = run_from(place.output / "more", 2)
    assert log["stages"]["base"]["config"]["steps"] == 2
    assert any((more[name] != value).any() for name, value in given.items())


def test_templates_of_large_numbers_are_left_out(records):
    narrow = problems.all_problems(below=40)
    assert {r["template"] for r in narrow if r["split"] != "new_template"} == {3}
    assert {r["template"] for r in narrow if r["split"] == "new_template"} == {8}
    assert problems.all_problems(below=40) == problems.all_problems(only=[3])
    training = [r for r in problems.all_problems(counts={"train": 3}) if r["split"] == "train"]
    assert sum(r["template"] == 0 for r in training) == 3
    record = {"prompt": "12 and 7.5", "response": "12 + 7.5 = 19.5, 7.5 + 12 = 20"}
    assert problems.computed(record) == 20


def test_the_file_has_as_many_problems_as_asked_for(records, tmp_path, monkeypatch, capsys):
    def write(*options):
        path = tmp_path / "problems.jsonl"
        monkeypatch.setattr(sys, "argv", ["problems", "--output", str(path), *options])
        return problems.main(), path

    status, path = write("--train", "9", "--distill", "3", "--test", "2")
    assert status == 0
    splits = task.read_problems(path)
    sizes = {name: sum(r["template"] == 0 for r in found) for name, found in splits.items()}
    assert sizes == {"train": 9, "distill": 3, "test": 2, "new_template": 0}
    assert write("--test", "0")[0] == 1
    assert capsys.readouterr().err == "error: --test must be at least 1, got 0\n"


def test_the_small_recipe(records, tmp_path, monkeypatch):
    data, output = tmp_path / "problems.jsonl", tmp_path / "run"
    problems.write_problems(data, records)
    started = []
    monkeypatch.setattr(command, "run_recipe", lambda place, **options: started.append(place))
    options = ["--small", "--data", str(data), "--output", str(output), "--device", "cpu"]
    assert main(["train", "--config", "gsm", *options]) == 0
    (place,) = started
    assert place.build_model().num_parameters() < Recipe().small().sizes["hidden_size"] ** 2 * 60
    assert [stage.config.batch_size for stage in place.recipe.bases] == [64, 64]
    assert place.recipe.continued(7).bases[0].config.batch_size == 64
    assert {stage.config.batch_size for stage in place.recipe.arms} == {64}
    assert {stage.config.batch_size for stage in Recipe().arms} == {128}

    assert main(["train", "--config", "gsm", *options, "--scale", "0.5", "--base-scale", "4"]) == 0
    small, changed = Recipe().small(), started[1].recipe
    for stages, others, factor in (
        (changed.bases, small.bases, 2),
        (changed.arms, small.arms, 0.5),
    ):
        assert [s.config.steps for s in stages] == [s.config.steps * factor for s in others]


def test_a_run_on_other_data_is_refused(place, records, monkeypatch):
    stage = place.recipe.bases[0]
    place.train(stage, place.examples(place.splits["train"]))
    problems.write_problems(place.data, records[1:])
    other = replace(place)
    with pytest.raises(ValueError, match="data"):
        other.train(stage, other.examples(other.splits["train"]))


def outcome_of(right, forwards):
    n = len(right)
    return Outcome({"answer": right, "strict": right}, [9] * n, [True] * n, [forwards] * n, [1] * n)


def test_claims_are_judged_by_their_intervals():
    good, bad = outcome_of([True] * 60, 2), outcome_of([True] * 30 + [False] * 30, 4)
    claim = claims.Claim("", "", Cell("a", "spd", 0.5), Cell("b", "spd", 0.5))
    rows = {claim.first: good, claim.second: bad}
    assert claims.judge(claim, rows).verdict == "holds"
    assert claims.judge(replace(claim, margin=80.0), rows).verdict == "fails"
    assert claims.judge(replace(claim, margin=50.0), rows).verdict == "undecided"
    assert claims.judge(claim, {claim.first: good}).verdict == "not run"
    assert {each.verdict for each in claims.verdicts({})} == {"not run"}


def test_aup_claims_compare_methods_over_all_their_thresholds():
    claim = claims.AupClaim("", "", ("oput", "spd"), ("base", "threshold"))
    rng = random.Random(0)
    right = [rng.random() < 0.9 for _ in range(40)]
    rows = {c: outcome_of(right, 2) for c in claims.method_cells("oput", "spd")}
    rows |= {c: outcome_of(right, 8) for c in claims.method_cells("base", "threshold")}
    assert claims.judge_aup(claim, rows).verdict == "holds"
    assert claims.judge_aup(
        replace(claim, first=claim.second, second=claim.first), rows
    ).verdict == ("fails")
    rows.popitem()
    assert claims.judge_aup(claim, rows).verdict == "not run"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--data must be the one file"),
        (["--data", "none.jsonl"], "--data must be a file, got no file"),
        (["--data", "none.jsonl", "--steps", "3"], "--config gsm takes .*, got --steps"),
        (["--data", "none.jsonl", "--scale", "0"], "--scale must be positive"),
        (["--data", "none.jsonl", "--base-scale", "inf"], "--base-scale must be positive"),
        (["--data", "none.jsonl", "--workers", "0"], "--workers must be at least 1"),
    ],
)
def test_bad_options_are_refused_in_one_sentence(tmp_path, capsys, options, message):
    output = str(tmp_path / "run")
    assert main(["train", "--config", "gsm", "--output", output, *options]) != 0
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1
    assert re.search(message, error), error
