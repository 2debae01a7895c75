"""The recipe of the shipped checkpoints: its first losses, distillation, the whole pipeline."""

import json
from dataclasses import asdict, replace

import pytest
from training_models import random_model

from dmax_kernels.__main__ import main
from dmax_kernels.gsm.stages import ARMS
from dmax_kernels.models.checkpoint import SHIPPED_DIR
from dmax_kernels.ring_walk import distill, recipe, stages
from dmax_kernels.ring_walk.data import ring_walk_examples
from dmax_kernels.ring_walk.ladder import Arm
from dmax_kernels.training import loop

pytestmark = pytest.mark.usefixtures("one_thread")


# The first mean of the shipped log takes 50 steps; these are its first losses, of the loop that
# made the shipped checkpoints.
FIRST_LOSSES = (3.82864, 3.82392, 3.81297)


def test_the_recipe_still_makes_the_shipped_checkpoints(tmp_path):
    model = recipe.new_model(stages.BASE_BLOCK16, None)
    rows = recipe.run_stage(
        stages.BASE_BLOCK16, model, None, tmp_path, ops="reference", stop_after=3
    )
    # Rounding alone: a different machine's matrix products may differ in the last bits
    assert [row["loss_masked"] for row in rows] == pytest.approx(FIRST_LOSSES, rel=1e-4)


@pytest.mark.slow
def test_the_first_fifty_steps_are_those_of_the_shipped_log(tmp_path):
    log = json.loads((SHIPPED_DIR / "training_log.json").read_text())
    model = recipe.new_model(stages.BASE_BLOCK16, None)
    rows = recipe.run_stage(
        stages.BASE_BLOCK16, model, None, tmp_path, ops="reference", stop_after=50
    )
    mean = sum(row["loss_masked"] for row in rows) / 50
    shipped = log["stages"]["base_block16"]["loss_means_of_50_steps"][0]
    assert mean == pytest.approx(shipped, abs=2e-3)


def test_the_numbers_are_those_of_the_shipped_log():
    log = json.loads((SHIPPED_DIR / "training_log.json").read_text())
    renamed = {"muon_lr": "muon_learning_rate", "adamw_lr": "learning_rate"}
    for stage in (stages.BASE_BLOCK16, stages.BASE, stages.OPUT, stages.CONTROL):
        now = {**stage.as_dict(), **stage.as_dict()["config"]}
        then = log["stages"][stage.name]
        for name, value in then.items():
            name = renamed.get(name, name)
            if name in now:
                assert now[name] == value, (stage.name, name)
    assert {name: log["distillation"][name] for name in asdict(stages.DISTILLATION)} == asdict(
        stages.DISTILLATION
    )


def test_logs_have_a_stages_fields_in_one_order():
    """The files of a run hold a stage as it was first written, its settings last."""
    fields = ["name", "start_from", "data", "num_moves", "config"]
    assert list(stages.OPUT.as_dict()) == list(Arm("uniform", 200).stage().as_dict()) == fields
    in_words = ARMS[0].as_dict()
    assert list(in_words) == [name for name in fields if name != "num_moves"]
    assert in_words["config"] == ARMS[0].config.as_dict()


def test_distillation_resumes_and_drops_incomplete_responses(tmp_path):
    model = random_model(block_length=32).eval()
    settings = stages.Distillation(
        problems=6, num_moves=6, threshold=0.0, batch_size=2, seed=0
    )  # an untrained model writes noise: threshold 0 takes it in one pass a block
    folder = tmp_path / "distillation"
    whole = distill.distill(settings, model, folder)
    assert [answer.index for answer in whole] == list(range(6))
    part = folder / "part-0000.jsonl"
    lines = part.read_text().splitlines(keepends=True)
    part.write_text("".join(lines[:2]) + lines[2][:20])  # killed while it wrote the third
    resumed = distill.distill(settings, model, folder)
    assert [answer.response for answer in resumed] == [answer.response for answer in whole]
    with pytest.raises(ValueError, match=r"distillation must belong .* seed = 1, got 0"):
        distill.distill(replace(settings, seed=1), model, folder)

    kept = {0: [20, 2], 2: [21, 21, 2], 5: [2]}
    answers = [
        replace(answer, complete=answer.index in kept, response=kept.get(answer.index, [20, 20]))
        for answer in whole
    ]
    examples = distill.distilled_examples(settings, answers, 32)
    assert [list(example.response) for example in examples] == list(kept.values())
    none = [replace(answer, complete=False) for answer in whole]
    with pytest.raises(ValueError, match="complete at least one response, got none in 6"):
        distill.distilled_examples(settings, none, 32)


def test_the_whole_pipeline(tmp_path, monkeypatch, capsys):
    """A few steps of every stage: the checkpoints and the log are written, and found again."""
    monkeypatch.setattr(loop.Metrics, "draw", lambda self: None)
    for name in ("BASE_BLOCK16", "BASE", "OPUT", "CONTROL"):
        stage = getattr(stages, name)
        short = replace(stage.config, steps=2, batch_size=1)
        monkeypatch.setattr(recipe, name, replace(stage, config=short))
    settings = replace(stages.DISTILLATION, problems=8, threshold=0.0)
    monkeypatch.setattr(recipe, "DISTILLATION", settings)
    monkeypatch.setattr(recipe, "EVALUATION_PROBLEMS", 2)
    rows = dict.fromkeys(recipe.EVALUATIONS, (("threshold", 0.0), ("spd", 0.0)))
    monkeypatch.setattr(recipe, "EVALUATIONS", rows)
    # Two steps teach no model to end a response.
    monkeypatch.setattr(
        recipe,
        "distilled_examples",
        lambda settings, answers, block_length: [
            example
            for example, _ in zip(ring_walk_examples(6, block_length, 0), answers, strict=False)
        ],
    )
    arguments = ["train", "--config", "ring_walk", "--output", str(tmp_path / "out")]
    assert main(arguments) == 0
    out = tmp_path / "out"
    names = {path.name for path in out.iterdir()}
    assert names == {"base", "oput", "control", "training_log.json", "stages"}
    log = json.loads((out / "training_log.json").read_text())
    assert log["command"].startswith("python -m dmax_kernels train --config ring_walk")
    assert set(log["stages"]) == {"base_block16", "base", "oput", "control"}
    assert log["stages"]["oput"]["config"]["steps"] == 2
    assert log["distillation"]["kept"] == 8
    assert {row["rule"] for row in log["evaluation"]["oput"]} == {"spd", "threshold"}
    assert main(arguments) == 0
    assert json.loads((out / "training_log.json").read_text()) == log
    assert str(tmp_path) not in json.dumps(log)
