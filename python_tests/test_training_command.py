"""The training command: its configuration file, its mistakes, its help, an interruption."""

import json

import pytest
import torch
from test_training_run import arguments, folder, no_picture, one_line

from dmax_kernels.__main__ import main
from dmax_kernels.training import loop

__all__ = ["folder", "no_picture"]  # fixtures


pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_configuration_file_is_overridden_by_the_command_line(folder, tmp_path, capsys):
    config = tmp_path / "config.json"
    values = {
        "model": str(folder / "model"),
        "data": [str(folder / "walks.jsonl")],
        "mask_ratio": [0.5, 0.9],
        "gradient_checkpointing": True,
        "batch_size": 4,
        "steps": 9,
        "max_length": None,
    }
    config.write_text("\ufeff" + json.dumps(values), "utf-8")  # as Windows editors save it
    argv = ["train", "--config", str(config), "--steps", "7", "--stop-after", "1"]
    assert main([*argv, "--output", str(tmp_path / "run")]) == 0
    assert "7 steps of 4 on" in capsys.readouterr().out
    run = tmp_path / "run/checkpoints/step-00000001/training_state/run.json"
    settings = json.loads(run.read_text())["settings"]
    assert settings["mask_ratio"] == [0.5, 0.9]
    assert settings["gradient_checkpointing"] is True
    assert settings["block_length"] == 4  # the model's own

    for text, message in (
        ('{"stepps": 3}', "unrecognized arguments: --stepps=3"),
        ('{"steps": "many"}', "argument --steps: invalid int value: 'many'"),
        ('{"config": "ring_walk"}', "config is no option of a file"),
        ('{"steps": {"most": 3}}', "steps must be text, a number, true, false, null or a list of"),
        ("[]", "must hold an object, got list"),
        ("{", "must be JSON"),
        ("[" * 99999, "must be JSON that is not nested so deeply"),
    ):
        config.write_text(text)
        assert main(["train", "--config", str(config)]) == 1
        assert message in one_line(capsys)


def test_a_mistake_is_told_in_one_line(folder, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "bad.jsonl").write_text('{"prompt": 1}\n')
    base = ["--model", str(folder / "model"), "--data", str(folder / "walks.jsonl")]
    cases = [
        ([], "--model must be given"),
        (
            ["--model", str(folder / "model")],
            "--dataset must be given, got neither",
        ),
        ([*base, "--dataset", "walks"], "--dataset must be given, got both"),
        (["--model", "none", *base[2:]], "OWNER/NAME on the Hugging Face hub, got 'none'"),
        ([*base[:3], "none.jsonl"], "got no file none.jsonl"),
        ([*base[:3], str(tmp_path / "bad.jsonl")], "bad.jsonl:1: needs"),
        ([*base, "--threads", "0"], "--threads must be at least 1, got 0"),
        ([*base, "--stop-after", "0"], "--stop-after must be at least 1, got 0"),
        ([*base, "--batch-size", "0"], "batch_size must be at least 1, got 0"),
        ([*base, "--mask-ratio", "0.9", "0.1"], "mask_ratio must be 0 <= LOW <= HIGH <= 1"),
        ([*base, "--objective", "mdlm", "--passes", "alternating"], "passes must be joint"),
        ([*base, "--share-masks"], "passes must be alternating with share_masks, got joint"),
        ([*base, "--mask-weight", "inverse"], "objective must be mdlm with mask_weight inverse"),
        ([*base, "--certainty-temperature", "0"], "certainty_temperature must be positive"),
        ([*base, "--batch-size", "3", "--micro-batch-size", "2"], "batch_size must be a multiple"),
        ([*base, "--attention", "flex"], "attention must be sdpa on a CPU"),
        ([*base, "--mask-token-id", "46"], "mask_token_id must be in [0, 46), got 46"),
        ([*base, "--max-length", "3"], "at least one usable record, got 12 too long"),
        ([*base, "--output", str(tmp_path / "file")], "--output must be a folder, got the file"),
        (
            ["--config", "ring_walk", "--steps", "3"],
            "takes --output, --ops and --threads, got --",
        ),
        (
            ["--config", str(tmp_path / "none")],
            "must be ring_walk or ring_walk_ladder or gsm or a JSON",
        ),
    ]
    if not torch.cuda.is_available():
        cases.append(([*base, "--device", "cuda"], "--device must be cpu where torch finds no GPU"))
    for more, message in cases:
        output = [] if "--output" in more else ["--output", str(tmp_path / "run")]
        assert main(["train", *more, *output]) == 1, more
        assert message in one_line(capsys), more
    with pytest.raises(SystemExit):
        main(["train", "--ops", "fast"])
    assert "invalid choice: 'fast'" in capsys.readouterr().err


def test_help_has_every_number_of_a_run(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for name in loop.TrainConfig.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in text
    assert "torchrun --nproc-per-node" in text


def test_an_interrupted_command_says_how_to_go_on(folder, tmp_path, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop.Trainer, "step", interrupted)
    assert main(arguments(folder, tmp_path)) == 130
    assert f"interrupted; the same command continues from {tmp_path}" in capsys.readouterr().err
