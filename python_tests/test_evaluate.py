"""`python -m dmax_kernels evaluate`: its figures, its table, its files, and mistakes."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from stand_in import save_stand_in

from dmax_kernels.__main__ import main
from dmax_kernels.cli import evaluate as command
from dmax_kernels.decoding import spd_generate
from dmax_kernels.evaluation import cells, metrics
from dmax_kernels.models import workers
from dmax_kernels.models.checkpoint import load_checkpoint
from dmax_kernels.models.pretrained import load_pretrained
from dmax_kernels.ring_walk import evaluate, task
from dmax_kernels.ring_walk.evaluate import Cell

ROOT = Path(__file__).resolve().parents[1]

PNG = b"\x89PNG"
FIRST = 10  # problems after which a row may stop


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True, scope="module")
def _few_first_problems():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cells, "FIRST_PROBLEMS", FIRST)
        yield


def run(*more, data="ring_walk"):
    return main(["evaluate", "--data", str(data), "--device", "cpu", *map(str, more)])


def one_line(capsys):
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.splitlines()[-1]


@pytest.fixture(scope="module")
def walks(tmp_path_factory):
    """One run over more problems than the first batch, with a row that collapses."""
    folder = tmp_path_factory.mktemp("evaluate")
    problems = FIRST + 4
    printed = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *text, **_: printed.append(" ".join(map(str, text))))
        status = run(
            *("--model", "base", "--model", "oput", "--problems", problems),
            *("--rule", "spd:0.5", "--rule", "threshold:0.9,0.5", "--baseline", 3),
            *("--json", folder / "rows.json", "--picture", folder / "rows.png"),
            *("--responses", folder / "responses.jsonl"),
        )
    assert status == 0
    return "\n".join(printed), json.loads((folder / "rows.json").read_text()), folder, problems


def test_the_rows_are_the_demos_cells(walks):
    _, report, _, count = walks
    expected = [
        Cell(model, rule, tau)
        for model in ("base", "oput")
        for rule, tau in (("spd", 0.5), ("threshold", 0.9), ("threshold", 0.5))
    ]
    names = {name: name for name in ("base", "oput")}
    problems = task.evaluation_problems(count)
    demo = dict(evaluate.evaluate_cells(expected, names, problems, "fused", workers=1))
    assert len(report["rows"]) == len(expected)
    renamed = {
        "tokens_per_forward": "tokens_per_forward_mean",
        "tokens_per_forward_authors": "tokens_per_forward_mean_without_eos",
    }
    for row, cell in zip(report["rows"], expected, strict=True):
        outcome = demo[cell]
        assert (row["model"], row["rule"], row["tau_dec"]) == (cell.model, cell.rule, cell.tau_dec)
        assert row["per_problem"]["right"] == outcome.right
        for name, value in vars(evaluate.Result.of(outcome)).items():
            if name not in ("arness", "tokens_per_second"):
                assert row[renamed.get(name, name)] == value, (cell, name)
    assert [row["collapsed"] for row in report["rows"]] == [True, *[False] * 5]
    assert {row["problems"] for row in report["rows"]} == {count, FIRST}


def test_a_configuration_file_is_the_options_that_are_not_typed(tmp_path):
    """Models and rules are lists there, which a typed one replaces."""
    config, whole, typed = (tmp_path / f"{name}.json" for name in ("config", "whole", "typed"))
    values = {
        **{"model": ["base", "own=oput"], "rule": ["spd:0.5", "threshold:0.9"], "problems": 2},
        **{"data": "ring_walk", "device": "cpu", "max_new_tokens": 16, "raw": False},
    }
    config.write_text(json.dumps(values))

    def rows(output, *more, option="--config"):
        argv = ["evaluate", option, str(config), "--json", str(output), *more]
        assert main(argv) == 0
        report = json.loads(output.read_text())
        assert report["options"]["max_new_tokens"] == 16
        return [(row["model"], row["rule"], row["problems"]) for row in report["rows"]]

    rules = ("spd", "threshold")
    assert rows(whole) == [(model, rule, 2) for model in ("base", "own") for rule in rules]
    one = [("oput", rule, 1) for rule in rules]
    assert rows(typed, "--model", "oput", "--problems=1") == one
    # As argparse abbreviates
    assert rows(typed, "--mod=oput", "--problems=1", option="--conf") == one


def test_a_terminal_without_the_letters_of_the_table():
    command = [sys.executable, "-m", "dmax_kernels", "evaluate", "--model", "oput"]
    command += ["--data", "ring_walk", "--problems", "1", "--max-new-tokens", "8"]
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}
    result = subprocess.run([*command, "--device", "cpu"], cwd=ROOT, env=env, capture_output=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert rb" \xb1 " in result.stdout


def test_samples_depend_on_the_problem_and_its_seed_alone(tmp_path):
    """Whatever the batch is; another seed samples other answers, and problem n has seed N + n."""

    def responses(name, *more):
        status = run(
            *("--model", "oput", "--problems", 5, "--rule", "spd:0.5", "--rule", "threshold:0.9"),
            *("--responses", tmp_path / name, "--temperature", 1.5, "--top-p", 0.98, *more),
        )
        assert status == 0
        lines = (tmp_path / name).read_text().splitlines()
        return [json.loads(line)["response"] for line in lines]

    sampled = responses("together", "--sample-seed", 3)
    assert responses("two", "--sample-seed", 3, "--batch-size", 2) == sampled
    assert responses("other", "--sample-seed", 1000) != sampled
    loaded = load_pretrained("oput")
    third = task.encode_prompt(task.evaluation_problems(3)[2], 32)
    output = spd_generate(
        loaded.model, [third], max_new_tokens=evaluate.MAX_NEW_TOKENS, tau_dec=0.5,
        temperature=1.5, top_p=0.98, seed=3 + 2,
    )  # fmt: skip
    assert sampled[2] == loaded.tokenizer.decode(output.answers[0], skip_special_tokens=True)


def test_the_figures_follow_from_the_problems(walks):
    _, report, _, _ = walks
    rows = report["rows"]
    for row in rows:
        each = row["per_problem"]
        n = row["problems"]
        assert row["strict"] == sum(each["right"]["strict"]) / n
        assert row["incomplete"] == n - sum(each["complete"])
        plain = [t - ends for t, ends in zip(each["tokens"], each["complete"], strict=True)]
        assert row["tokens_per_forward_sum"] == sum(each["tokens"]) / sum(each["forwards"])
        assert row["tokens_per_forward_sum_without_eos"] == sum(plain) / sum(each["forwards"])
        ratios = [t / f for t, f in zip(plain, each["forwards"], strict=True)]
        assert row["tokens_per_forward_mean_without_eos"] == pytest.approx(sum(ratios) / n)
    best = 100 * max(row["strict"] for row in rows)
    points = [row for row in rows if (row["model"], row["rule"]) == ("base", "threshold")]
    expected = metrics.aup(
        [row["tokens_per_forward_mean_without_eos"] for row in points],
        [100 * row["strict"] for row in points],
        best,
    )
    (score,) = [s for s in report["aup"] if (s["model"], s["rule"]) == ("base", "threshold")]
    assert score["aup_strict"] == pytest.approx(expected)
    assert len(report["paired"]) == 2 * 6 * 5 / 2
    for pair in report["paired"]:
        right = [
            rows[i]["per_problem"]["right"][pair["measure"]]
            for i in (pair["first"], pair["second"])
        ]
        expected = vars(metrics.paired(*right))
        assert {name: pair[name] for name in expected} == expected


def test_the_table_holds_the_figures(walks):
    printed, report, _, _ = walks
    lines = printed.splitlines()
    for number, row in enumerate(report["rows"]):
        (line,) = [line for line in lines if line.startswith(f"{number:>3} {row['model']} ")]
        columns = [column.split() for column in line.replace("*", " ").split("|")]
        assert columns[0][1:] == [row["model"], row["rule"], f"{row['tau_dec']:g}"]
        assert columns[1][0] == f"{100 * row['answer']:.1f}"
        assert columns[1][3] == f"{100 * row['strict']:.1f}"
        assert ("*" in line) == row["collapsed"]
        rates = [row[name] for name in row if name.startswith("tokens_per_forward")]
        assert columns[2][:5] == [f"{rate:.2f}" for rate in (*rates, row["forwards_per_block"])]
    differences = [line for line in lines if " - 3: answer " in line]
    assert len(differences) == 5  # every other row against the baseline
    change = 100 * (report["rows"][5]["strict"] - report["rows"][3]["strict"])
    assert f"strict {change:+.1f} [" in differences[-1]
    for score in report["aup"]:
        (line,) = [x for x in lines if x.startswith(f"{score['model']} {score['rule']} ")]
        assert line.split()[-2:] == [f"{score[f'aup_{m}']:.0f}" for m in ("answer", "strict")]


def test_what_a_run_writes(walks):
    _, report, folder, _ = walks
    assert (folder / "rows.png").read_bytes().startswith(PNG)
    rows = [json.loads(line) for line in (folder / "responses.jsonl").read_text().splitlines()]
    assert len(rows) == sum(row["problems"] for row in report["rows"])
    tokenizer = load_checkpoint("oput")[1]
    for row in random.Random(0).sample(rows, 12):
        problem = task.evaluation_problems(60)[int(row["problem"][len("ring_walk[") : -1])]
        words = tokenizer(row["response"])["input_ids"] + [task.EOS_ID] * row["complete"]
        graded = task.grade(problem, task.decode(words))
        assert (row["answer"], row["strict"]) == (graded.answer, graded.strict)


def test_an_evaluation_goes_on_from_its_finished_rows(tmp_path, monkeypatch, capsys):
    rows, decoded = tmp_path / "rows", []
    decode = cells.decode

    def interrupted(model, problems, cell, options):
        decoded.append(cell.tau_dec)
        if len(decoded) == 2:
            raise KeyboardInterrupt
        return decode(model, problems, cell, options)

    monkeypatch.setattr(cells, "decode", interrupted)
    more = ["--model", "oput", "--problems", "3", "--logit-bias", "5=-0.25", "--rows", rows]
    assert run(*more, "--rule", "spd:0.5,0") == 130
    assert decoded == [0.5, 0.0]
    assert len(list(rows.iterdir())) == 1
    report = tmp_path / "rows.json"
    assert run(*more, "--rule", "spd:0.5,0,0.7", "--json", report) == 0
    assert decoded == [0.5, 0.0, 0.0, 0.7]  # the finished one is not decoded again
    resumed = json.loads(report.read_text())["rows"]
    assert run(*more[:-2], "--rule", "spd:0.5,0,0.7", "--json", report) == 0
    for row, whole in zip(resumed, json.loads(report.read_text())["rows"], strict=True):
        del row["tokens_per_second"], whole["tokens_per_second"]
        assert row == whole
    count = len(decoded)
    assert run(*more, "--rule", "spd:0.5", "--tau-acc", "0.8") == 1
    assert "must belong to a run with options = {" in one_line(capsys)
    assert run(*more, "--rule", "spd:0.5", "--seed", "1") == 1
    assert "must belong to a run with data = 3 prompts" in one_line(capsys)
    assert run("--model", "oput=base", *more[2:], "--rule", "spd:0.5") == 1
    assert "must belong to a run with model = base, got oput" in one_line(capsys)
    (broken,) = rows.glob("oput-spd-0.5-*")
    broken.write_text("{")
    assert run(*more, "--rule", "spd:0.5") == 1
    assert f"the row {broken}: must be JSON" in one_line(capsys)
    assert len(decoded) == count


@pytest.mark.slow
def test_workers_give_the_rows_of_one(tmp_path):
    reports = []
    for count in (1, 2):
        path = tmp_path / f"{count}.json"
        more = ("--model", "oput", "--rule", "spd:0.5,0", "--problems", 4, "--json", path)
        assert run(*more, "--workers", count) == 0
        report = json.loads(path.read_text())
        for row in report["rows"]:
            del row["tokens_per_second"]
        reports.append(report)
    assert reports[0] == reports[1]


@pytest.fixture
def problems(tmp_path):
    """Problems for a model with LLaDA2's interface: what it answers is random, but words."""
    rng = random.Random(1)
    records = [
        {"question": " ".join(f"w{rng.randrange(3, 100)}" for _ in range(5)), "gold": f"so w{i}"}
        for i in range(3, 8)
    ]
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path, records


def test_a_model_by_name_with_a_known_models_settings(problems, tmp_path, monkeypatch):
    """LLaDA2.0-mini decodes by its threshold; its weights are a stand-in's here."""
    name = "inclusionAI/LLaDA2.0-mini"
    folder = save_stand_in(tmp_path / "model", ids=True)
    path, records = problems
    loaded = load_pretrained(str(folder))

    def load(asked, **_):
        assert asked == name
        return loaded

    monkeypatch.setattr(workers, "load_pretrained", load)
    output = tmp_path / "rows.json"
    more = ["--prompt-field", "question", "--answer-field", "gold", "--prompt-suffix", " w2"]
    more += ["--extract", r"w(\d+)", "--max-new-tokens", "40", "--json", output]
    assert run("--model", name, *more, data=path) == 0
    (row,) = json.loads(output.read_text())["rows"]
    assert (row["rule"], row["tau_dec"]) == ("threshold", 0.95)
    right, tokens = [], []
    for record in records:  # one at a time, as in the paper
        messages = [{"role": "user", "content": record["question"] + " w2"}]
        ids = loaded.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        ids = ids if isinstance(ids, list) else ids["input_ids"]
        out = spd_generate(
            loaded.model, [ids], max_new_tokens=40, rule="threshold", tau_dec=0.95,
            eos_token_id=loaded.eos_token_ids,
        )  # fmt: skip
        words = loaded.tokenizer.decode(out.answers[0], skip_special_tokens=True).split()
        words = [word for word in words if word.startswith("w")]
        right.append(bool(words) and words[-1] == record["gold"].split()[1])
        tokens.append(len(out.answers[0]))
    assert row["per_problem"]["right"] == {"answer": right}
    assert row["per_problem"]["tokens"] == tokens


def is_long(response, record):
    return {"long": len(response.token_ids) > 20, "asked": "gold" in record}


def test_a_grade_of_the_users_own(problems, tmp_path):
    folder = save_stand_in(tmp_path / "model")
    output = tmp_path / "rows.json"
    more = ["--prompt-field", "question", "--grade", "test_evaluate:is_long", "--json", output]
    more += ["--max-new-tokens", "40", "--problems", "2", "--batch-size", "2", "--rule", "factor"]
    assert run("--model", f"mine={folder}", *more, data=problems[0]) == 0
    (row,) = json.loads(output.read_text())["rows"]
    assert row["model"] == "mine"
    assert row["rule"] == "factor"
    assert row["asked"] == 1.0
    assert row["problems"] == 2
    assert row["per_problem"]["right"]["long"] == [n > 20 for n in row["per_problem"]["tokens"]]


def moody(response, record):
    return {"long" if record["gold"] == "so w3" else "short": True}


def test_a_grade_with_other_measures_each_time_is_refused(problems, tmp_path, capsys):
    folder = save_stand_in(tmp_path / "model")
    more = ["--prompt-field", "question", "--grade", "test_evaluate:moody"]
    assert run("--model", folder, *more, "--max-new-tokens", "8", data=problems[0]) == 1
    assert "must have the same measures each time, long, got short" in one_line(capsys)


def test_a_mistake_is_one_line(problems, tmp_path, capsys):
    path, _ = problems
    walks = ["--model", "oput", "--problems", "2"]
    asked = ["--model", "oput", "--prompt-field", "question"]
    cases = [
        (["--model", "none"], "ring_walk", "OWNER/NAME on the Hugging Face hub, got 'none'"),
        (
            [*walks, "--model", "oput"],
            "ring_walk",
            "--model must be given once for each label, got oput",
        ),
        ([*walks, "--rule", "fast"], "ring_walk", "rule must be one of 'spd'"),
        ([*walks, "--rule", "spd:x"], "ring_walk", "--rule must be NAME or NAME:TAU,TAU,..., got"),
        ([*walks, "--rule", "spd:2"], "ring_walk", "tau_dec must be in [0, 1], got 2.0"),
        ([*walks, "--baseline", "1"], "ring_walk", "--baseline must be in [0, 1), got 1"),
        ([*walks, "--workers", "0"], "ring_walk", "--workers must be at least 1, got 0"),
        ([*walks, "--problems", "0"], "ring_walk", "--problems must be at least 1, got 0"),
        ([*walks, "--json", tmp_path], "ring_walk", "--json must be a file in a folder"),
        ([*walks, "--grade", "math:pi"], "ring_walk", "--grade must be a function"),
        ([*walks, "--rows", path], "ring_walk", "--rows must be a folder, got the file"),
        ([*asked], tmp_path / "none", "--data must be a file, got no file"),
        ([*asked], path, 'problems.jsonl:1: must have a text or number "answer"'),
        (["--model", "oput"], path, 'problems.jsonl:1: must have a text "prompt" or a list'),
        ([*asked, "--answer-field", "gold"], path, "a prompt of 32 tokens and max_new_tokens=2048"),
    ]
    for more, data, message in cases:
        assert run(*more, data=data) == 1, more
        assert message in one_line(capsys), more
    assert [entry.name for entry in tmp_path.iterdir()] == ["problems.jsonl"]


def test_help_explains_itself(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for word in ("--rule", "--extract", "--grade", "--baseline", "AUP", "paired by problem"):
        assert word in text
    assert command.DEFAULTS["max_new_tokens"] == 2048


PARENT = """\
import os, sys, time
from dmax_kernels.models.workers import run_tasks

def setup(number):
    return sleep

def sleep(path):
    with open(path, "w") as file:
        file.write(str(os.getpid()))
    time.sleep(600)

if __name__ == "__main__":
    list(run_tasks(setup, sys.argv[1:], workers=2))
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    """They would go on to write into the folder of the next run."""
    script, files = tmp_path / "parent.py", [tmp_path / "one", tmp_path / "other"]
    script.write_text(PARENT)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    parent = subprocess.Popen(
        [sys.executable, str(script), *map(str, files)], env={**os.environ, "PYTHONPATH": path}
    )

    def wait_until(done):
        end = time.monotonic() + 120
        while not done():
            assert time.monotonic() < end
            time.sleep(0.1)

    def has_ended(file):
        try:
            state = Path(f"/proc/{file.read_text()}/stat").read_text()
        except OSError:
            return True
        return state.rpartition(")")[2].split()[0] == "Z"  # nobody may be there to collect it

    try:
        wait_until(lambda: all(file.exists() and file.read_text() for file in files))
        assert not any(map(has_ended, files))
    finally:
        parent.kill()
        parent.wait()
    wait_until(lambda: all(map(has_ended, files)))
