"""The ladder of trainings: its arms, its files, that it goes on, and the page made of it."""

import json
import runpy
import shutil
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dmax_kernels.__main__ import main
from dmax_kernels.models.checkpoint import load_checkpoint
from dmax_kernels.ring_walk import evaluate, ladder, record, stages, task
from dmax_kernels.ring_walk.data import ring_walk_examples
from dmax_kernels.ring_walk.evaluate import Cell
from dmax_kernels.ring_walk.ladder import Arm

ROOT = Path(__file__).parent.parent


pytestmark = pytest.mark.usefixtures("one_thread")


def test_arms_differ_in_method_steps_and_seed_alone():
    arms = ladder.all_arms()
    assert len({arm.name for arm in arms}) == len(arms)
    first = Arm("oput", 600).stage()
    assert first.config == stages.OPUT.config  # the recipe's own training is an arm
    assert Arm("control", 600).stage().config == stages.CONTROL.config
    for arm in arms:
        stage = arm.stage()
        changed = {"steps", "seed", "objective", "rollout_temperature", "mask_level"}
        kept = {k: v for k, v in stage.config.as_dict().items() if k not in changed}
        assert kept == {k: v for k, v in first.config.as_dict().items() if k not in changed}
        assert (stage.start_from, stage.data) == ("base", "distilled")
    for method in ("oput", "control", "uniform", "certainty"):
        assert {arm.steps for arm in arms if arm.method == method} == set(ladder.RUNGS)
        for steps in (200, 600):
            seeds = {arm.seed for arm in arms if (arm.method, arm.steps) == (method, steps)}
            assert seeds == set(ladder.SEEDS)
    assert {arm.seed for arm in arms if arm.method == "oput_drawn"} == set(ladder.SEEDS)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Three arms of two steps, one of which was trained before by an interrupted run."""
    output = tmp_path_factory.mktemp("ladder")
    arms = [Arm(method, 2) for method in ("oput", "control", "uniform", "certainty")]
    with pytest.MonkeyPatch.context() as patch:
        examples = list(islice(ring_walk_examples(6, 32, 0), 256))
        patch.setattr(ladder, "ladder_examples", lambda output, ops: examples)
        assert list(ladder.train_ladder(output, arms[:1])) == arms[:1]
        written = (output / "oput-2" / "model.safetensors").stat().st_mtime_ns
        assert list(ladder.train_ladder(output, arms)) == arms
        assert (output / "oput-2" / "model.safetensors").stat().st_mtime_ns == written
        patch.setattr(ladder, "Training", None)  # nothing is left to train
        assert list(ladder.train_ladder(output, arms)) == arms
    return output, arms


def test_an_arm_is_a_checkpoint_with_its_log(trained):
    output, arms = trained
    assert not list((output / "stages").iterdir())
    for arm in arms:
        weights = load_file(output / arm.name / "model.safetensors")
        assert {value.dtype for value in weights.values()} == {torch.float16}
        model, _ = load_checkpoint(output / arm.name)
        for name, value in model.state_dict().items():
            assert value.dtype == torch.float32
            assert torch.equal(value, weights[name].float())
        log = json.loads((output / "logs" / f"{arm.name}.json").read_text())
        assert log["config"]["steps"] == 2
        assert log["made_with"]["torch"] == torch.__version__


def test_the_record_resumes_and_judges(trained, monkeypatch):
    output, arms = trained
    monkeypatch.setattr(record, "RUNGS", (2,))
    monkeypatch.setattr(evaluate, "MAX_NEW_TOKENS", 32)
    few = {"problems": 2}
    content = record.write_record(output, arms, **few)
    assert json.loads((output / "ladder.json").read_text()) == content
    assert {row["arm"] for row in content["rows"]} == {"base", *(arm.name for arm in arms)}
    assert len(content["rows"]) == len(record.arm_cells(arms))
    assert [(j["steps"], j["measure"]) for j in content["judged"]] == [
        (2, "answer"),
        (2, "strict"),
    ]
    # All but one row are found where the interrupted run left them
    rows = sorted((output / "rows").iterdir())
    assert len(rows) == len(content["rows"])
    rows[0].unlink()
    decoded = []
    one = record.evaluate_cells

    def counting(cells, *arguments):
        decoded.extend(cells)
        return one(cells, *arguments)

    monkeypatch.setattr(record, "evaluate_cells", counting)
    again = record.write_record(output, arms, **few)
    assert len(decoded) == 1
    assert again == content
    with pytest.raises(ValueError, match="problems = 4, got 2"):
        record.write_record(output, arms, problems=4)


def test_what_ships_is_loaded_without_the_models_code(trained, tmp_path, monkeypatch):
    output, arms = trained
    monkeypatch.setattr(record, "SHIPPED", ("base", *(arm.name for arm in arms[:2])))
    copy = tmp_path / "ladder"
    shutil.copytree(output, copy, ignore=shutil.ignore_patterns("rows"))
    (copy / "ladder.json").write_text("{}")
    record.ship(copy, tmp_path / "weights")
    names = {path.name for path in (tmp_path / "weights").iterdir()}
    assert names == {"ladder.json", *(arm.name for arm in arms[:2])}
    folder = tmp_path / "weights" / arms[0].name
    assert not list(folder.glob("*.py"))
    assert "auto_map" not in json.loads((folder / "config.json").read_text())
    model, _ = load_checkpoint(folder)
    assert model.config.block_length == 32


def test_the_command_trains_and_records(tmp_path, monkeypatch, capsys, trained):
    """All of it, on arms that are there; and a GPU that is not."""
    output, arms = trained
    copy = tmp_path / "ladder"
    shutil.copytree(output, copy, ignore=shutil.ignore_patterns("rows", "ladder.json"))
    monkeypatch.setattr(ladder, "all_arms", lambda: arms[:1])
    monkeypatch.setattr(record, "PROBLEMS", 2)
    write = record.write_record
    monkeypatch.setattr(record, "write_record", lambda *a, **k: write(*a, **{**k, "problems": 2}))
    monkeypatch.setattr(evaluate, "MAX_NEW_TOKENS", 32)
    command = ["train", "--config", "ring_walk_ladder", "--output", str(copy)]
    assert main(command) == 0
    assert "oput-2 is trained" in capsys.readouterr().out
    assert (copy / "ladder.json").is_file()
    if not torch.cuda.is_available():
        assert main([*command, "--device", "cuda"]) == 1
        assert "--device must be cpu where torch finds no GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "base", "--workers", "2"], "--workers must go with --config ring_walk_ladder"),
        (["--config", "ring_walk_ladder", "--workers", "0"], "--workers must be at least 1, got 0"),
        (
            ["--config", "ring_walk_ladder", "--seed", "3"],
            "takes --output, --ops, --threads, --device and --workers, got --seed",
        ),
    ],
)
def test_a_mistake_is_one_line(arguments, message, tmp_path, capsys):
    assert main(["train", *arguments, "--output", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_float16_weights_decide_as_float32_ones():
    """The recipe's OPUT model, with its weights rounded as the ladder's are."""
    problems = task.evaluation_problems(60, seed=7)
    outcomes = []
    for rounded in (False, True):
        model, _ = load_checkpoint("oput")
        if rounded:
            weights = {name: value.half().float() for name, value in model.state_dict().items()}
            model.load_state_dict(weights)
        cell = Cell("oput", "spd", 0.5)
        outcomes.append(evaluate.evaluate_cell(model, problems, cell, "fused"))
    plain, rounded = outcomes
    different = sum(one != other for one, other in zip(plain.texts, rounded.texts, strict=True))
    assert different <= 3  # of 60; a decision flips only where two tokens are nearly tied
    assert abs(plain.share("strict") - rounded.share("strict")) <= 0.05


def test_the_view_takes_the_first_seed_where_a_method_lacks_the_other():
    arms = [Arm("oput", 200, 5), *(Arm(m, 200) for m in ("control", "uniform", "certainty"))]
    outcomes = {cell: object() for cell in record.arm_cells(arms)}
    found = record.view(outcomes, arms, 200, 5, "oput")
    assert set(found) == set(evaluate.all_cells())
    spd = Cell("oput", "spd", 0.5)
    assert found[spd] is outcomes[replace(spd, model="oput-200-seed5")]
    control = Cell("control", "threshold", 0.5)
    assert found[control] is outcomes[replace(control, model="control-200")]
    assert list(record.views(arms)) == [(200, 5, "oput")]


def test_the_reproduction_page_is_the_one_that_its_figures_make():
    page = runpy.run_path(str(ROOT / "docs" / "reproduction" / "page.py"))
    assert (ROOT / "docs" / "reproduction.md").read_text() == page["build"](), (
        "run make reproduction"
    )


def test_the_page_lists_what_was_not_run(tmp_path):
    page = runpy.run_path(str(ROOT / "docs" / "reproduction" / "page.py"))
    other = page["other"]
    other.__globals__["HERE"] = tmp_path
    missing = [("Table 3", "a claim"), ("Table 5", "another")]
    assert "| Table 3 | a claim | not run |" in other("nap", "NAP", missing)
    found = {
        "command": "python -m x",
        "made_with": "Made here.",
        "tables": [{"title": "T", "columns": ["a", "b"], "rows": [["1", "2"]], "note": "N."}],
        "claims": [{"where": "Table 3", "claim": "c", "verdict": "fails", "figures": "-3"}],
    }
    (tmp_path / "nap.json").write_text(json.dumps(found))
    text = other("nap", "NAP", missing)
    assert "| Table 3 | c | **fails** | -3 |" in text
    assert "| Table 5 | another | not run |  |" in text
    assert "| 1 | 2 |" in text
