"""A training run: what it writes, resuming, failures, precision, processes."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_models import random_llama, save_random_model, write_walks

from dmax_kernels import files
from dmax_kernels.__main__ import main
from dmax_kernels.decoding import spd_generate
from dmax_kernels.models.checkpoint import load_checkpoint
from dmax_kernels.ring_walk.export import build_tokenizer
from dmax_kernels.training import loop

ROOT = Path(__file__).parent.parent
PNG = b"\x89PNG"
LOSSES = ("loss_masked", "loss_predicted")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model of block length 4, and 12 conversations: prompts of 7 to 11 tokens."""
    path = tmp_path_factory.mktemp("training")
    save_random_model(path / "model")
    write_walks(path / "walks.jsonl")
    return path


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    """Drawing takes longer than training here; `whole`, of module scope, is drawn."""
    monkeypatch.setattr(loop.Metrics, "draw", lambda self: None)


def arguments(folder, output, *more):
    # 6 steps of 4 rows in micro batches of 2: two epochs of 12
    return [
        *("train", "--model", str(folder / "model"), "--data", str(folder / "walks.jsonl")),
        *("--output", str(output), "--steps", "6", "--batch-size", "4"),
        *("--micro-batch-size", "2", "--learning-rate", "0.01", "--warmup-steps", "1"),
        *("--ops", "reference", "--save-every", "2", "--device", "cpu", *more),
    ]


def train(folder, output, *more):
    assert main(arguments(folder, output, *more)) == 0
    return metrics(output)


def metrics(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def losses(rows):
    return [[row[name] for name in LOSSES] for row in rows]


def assert_same_curves(one, other):
    """Up to rounding. The gradient's norm too: clipping and AdamW would hide a wrong scale."""
    names = (*LOSSES, "grad_norm")
    one, other = ([[row[name] for name in names] for row in rows] for rows in (one, other))
    torch.testing.assert_close(torch.tensor(one), torch.tensor(other), rtol=1e-4, atol=0)


def checkpoints(output):
    return sorted(path.name for path in (output / "checkpoints").iterdir())


def weights(output, step=6):
    return load_file(output / "checkpoints" / f"step-{step:08d}" / "model.safetensors")


def assert_equal_weights(one, other):
    assert one.keys() == other.keys()
    assert all(one[name].equal(other[name]) for name in one)


@pytest.fixture(scope="module")
def whole(folder):
    """An uninterrupted run."""
    train(folder, folder / "whole")
    return folder / "whole"


def test_a_run_that_is_still_going_on_is_left_alone(folder, tmp_path, capsys):
    output = tmp_path / "run"
    train(folder, output, "--stop-after", "2")
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    with files.one_writer(output):
        assert main(arguments(folder, output)) == 1
    assert f"{output} is being written by another process" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}


def test_what_a_run_leaves(folder, whole):
    rows = metrics(whole)
    assert [row["step"] for row in rows] == list(range(6))
    assert all(row["seconds"] > 0 and row["peak_memory"] > 1e6 for row in rows)
    assert sum(rows[-1][name] for name in LOSSES) < 0.9 * sum(rows[0][name] for name in LOSSES)
    assert rows[0]["learning_rate"] == 0.01
    assert rows[5]["learning_rate"] < 0.002
    assert checkpoints(whole) == ["step-00000004", "step-00000006"]  # --keep 2
    assert (whole / "loss.png").read_bytes().startswith(PNG)
    newest = whole / "checkpoints" / "step-00000006"
    model, tokenizer = load_checkpoint(newest)
    before = load_file(folder / "model" / "model.safetensors")
    assert_equal_weights(weights(whole), {k: v.contiguous() for k, v in model.state_dict().items()})
    assert not any(weights(whole)[name].equal(before[name]) for name in before)
    prompt = tokenizer("start 4 =", return_tensors="pt")["input_ids"]
    output = spd_generate(model, prompt, block_length=4, max_new_tokens=8, ops="reference")
    assert output.sequences.shape == (1, 11)


def test_a_resumed_run_is_the_same_bit_for_bit(folder, whole, tmp_path, capsys):
    # 3 is not a multiple of save_every: stopping there writes a checkpoint
    assert len(train(folder, tmp_path, "--stop-after", "3")) == 3
    # Log lines past the checkpoint, as after a kill, are dropped, and so is a line cut short
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({**metrics(tmp_path)[0], "step": 3, "loss_masked": 99.0}) + "\n")
        file.write('{"step": 4, "loss_m')
    rows = train(folder, tmp_path)
    assert losses(rows) == losses(metrics(whole))
    assert [row["grad_norm"] for row in rows] == [row["grad_norm"] for row in metrics(whole)]
    assert_equal_weights(weights(tmp_path), weights(whole))
    assert train(folder, tmp_path) == rows  # finished: nothing is trained again


def test_a_run_is_not_resumed_as_another(folder, whole, tmp_path, capsys):
    other = write_walks(tmp_path / "other.jsonl", count=5)
    shutil.copytree(folder / "model", tmp_path / "model")
    cases = [
        (["--learning-rate", "0.5"], "belong to a run with learning_rate = 0.5, got 0.01"),
        (["--data", str(other)], "belong to a run with data = 5 examples"),
        (["--model", str(tmp_path / "model")], f"model = {tmp_path / 'model'}, got {folder}"),
        (["--mask-token-id", "5"], "belong to a run with mask_token_id = 5, got "),
    ]
    for more, message in cases:
        assert main(arguments(folder, whole, *more)) == 1
        assert message in one_line(capsys)


def test_a_broken_record_of_a_run_names_its_file(folder, whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "run")
    record = tmp_path / "run/checkpoints/step-00000006/training_state/run.json"
    record.write_text("{")
    assert main(arguments(folder, tmp_path / "run")) == 1
    assert f"the checkpoint's record {record}: must be JSON" in one_line(capsys)
    record.unlink()
    assert main(arguments(folder, tmp_path / "run")) == 1
    assert f"the checkpoint's record must be a file, got no file {record}" in one_line(capsys)


def one_line(capsys):
    """What the command prints for a mistake."""
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return [line for line in error.splitlines() if not line.startswith(("\r", "reading"))][-1]


def test_fused_ops_differ_by_rounding(folder, whole, tmp_path):
    rows = train(folder, tmp_path, "--ops", "fused")
    assert_same_curves(rows, metrics(whole))


@pytest.mark.parametrize(
    "more", [("--micro-batch-size", "4"), ("--gradient-checkpointing",)], ids=["micro", "recompute"]
)
def test_what_saves_memory_changes_nothing_but_rounding(folder, whole, tmp_path, more):
    rows = train(folder, tmp_path, *more)
    assert_same_curves(rows, metrics(whole))


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16-autocast", "float32"), ("bf16-master", "bfloat16")]
)
@pytest.mark.parametrize("ops", ["reference", "fused"])
def test_bfloat16(folder, whole, tmp_path, precision, dtype, ops):
    more = ("--precision", precision, "--ops", ops)
    rows = train(folder, tmp_path, *more)
    # The first loss is the same weights in bfloat16: 8 bits, averaged over 50 positions
    first, expected = (torch.tensor(losses(r)[:1]) for r in (rows, metrics(whole)))
    torch.testing.assert_close(first, expected, rtol=0.03, atol=0)
    assert not first.equal(expected)
    assert sum(losses(rows)[-1]) < 0.9 * sum(losses(rows)[0])
    assert {str(w.dtype) for w in weights(tmp_path).values()} == {f"torch.{dtype}"}
    if ops == "reference":  # the float32 master weights are part of what is resumed
        train(folder, tmp_path / "part", *more, "--stop-after", "3")
        assert losses(train(folder, tmp_path / "part", *more)) == losses(rows)


def test_alternating_passes(folder, tmp_path):
    rows = train(folder, tmp_path, "--passes", "alternating", "--stop-after", "3")
    rows = train(folder, tmp_path, "--passes", "alternating")
    assert [row["loss_predicted"] is None for row in rows] == [True, False] * 3
    assert [row["loss_masked"] is None for row in rows] == [False, True] * 3
    # both passes of a pair of steps see the same sequences
    assert [row["tokens"] for row in rows[::2]] == [row["tokens"] for row in rows[1::2]]
    whole = train(folder, tmp_path / "whole", "--passes", "alternating")
    assert losses(whole) == losses(rows)


@pytest.mark.parametrize(
    ("objective", "names"),
    [
        ("uniform", ["loss_masked", "loss_uniform"]),
        ("mdlm", ["loss_masked"]),
        ("certainty", ["loss_masked", "loss_certainty"]),
    ],
)
def test_the_other_objectives_lower_their_loss(folder, tmp_path, objective, names):
    """`whole` is the run of oput."""
    more = ("--objective", objective, "--certainty-beta", "0.1")
    rows = train(folder, tmp_path, *more, "--learning-rate", "0.03", "--stop-after", "3")
    rows = train(folder, tmp_path, *more, "--learning-rate", "0.03")
    assert [name for name in rows[0] if name.startswith("loss_")] == names
    sums = [sum(row[name] for name in names) for row in rows]
    assert sum(sums[3:]) < 0.95 * sum(sums[:3])
    whole = train(folder, tmp_path / "whole", *more, "--learning-rate", "0.03")
    assert [row["grad_norm"] for row in whole] == [row["grad_norm"] for row in rows]


def test_presets_stand_below_what_is_given(folder, tmp_path):
    def settings(*more):
        output = tmp_path / str(len(list(tmp_path.iterdir())))
        argv = arguments(folder, output, "--stop-after", "1", *more)
        at = argv.index("--warmup-steps")
        assert main(argv[:at] + argv[at + 2 :]) == 0
        run = output / "checkpoints/step-00000001/training_state/run.json"
        return json.loads(run.read_text())["settings"]

    paper, released = settings("--preset", "paper"), settings("--preset", "released")
    assert {name for name in paper if paper[name] != released[name]} == {
        *("share_masks", "rollout_temperature", "loss_average", "eos_tail", "betas"),
        *("weight_decay", "warmup_fraction", "decay_to", "precision"),
    }
    assert paper["passes"] == released["passes"] == "alternating"
    assert released["warmup_fraction"] == 0.03
    assert released["betas"] == [0.9, 0.999]
    given = ("--preset", "released", "--objective", "mdlm", "--weight-decay", "0.5")
    mdlm = settings(*given)
    assert mdlm["passes"] == "joint"
    assert mdlm["weight_decay"] == 0.5
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"preset": "paper", "decay_to": 0.25}))
    from_file = settings("--config", str(config), "--passes", "joint", "--warmup-steps", "7")
    assert from_file == {**paper, "decay_to": 0.25, "passes": "joint", "share_masks": False} | {
        "warmup_steps": 7
    }


def test_epochs_give_the_number_of_steps(folder, tmp_path, capsys):
    for passes, steps in (("joint", 5), ("alternating", 10)):  # 1.5 epochs of 12 by 4, rounded up
        more = ("--epochs", "1.5", "--passes", passes, "--stop-after", "1")
        argv = arguments(folder, tmp_path / passes, *more)
        at = argv.index("--steps")
        assert main(argv[:at] + argv[at + 2 :]) == 0
        assert f"{steps} steps of 4 on 1 x cpu" in capsys.readouterr().out


def test_a_full_disk_leaves_the_last_good_checkpoint(folder, whole, tmp_path, capsys):
    train(folder, tmp_path, "--stop-after", "2")
    kept = weights(tmp_path, 2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:  # larger files than this fail to be written, as on a disk that is full: a real error
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        status = main(arguments(folder, tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 1
    message = one_line(capsys)
    assert "the checkpoint of step 4 could not be written" in message
    assert "the last good one is" in message
    assert "step-00000002" in message
    assert checkpoints(tmp_path) == ["step-00000002"]
    (tmp_path / "checkpoints" / ".step-00000004.tmp").mkdir()  # of a process that was killed
    assert_equal_weights(weights(tmp_path, 2), kept)
    assert losses(train(folder, tmp_path)) == losses(metrics(whole))
    assert checkpoints(tmp_path) == checkpoints(whole)


def test_files_of_the_users_own_stay(folder, whole, tmp_path, capsys):
    own = tmp_path / "run/checkpoints/step-00000001-best"  # no checkpoint of the run by its name
    own.mkdir(parents=True)
    (own / "notes.txt").write_text("mine")
    assert losses(train(folder, tmp_path / "run")) == losses(metrics(whole))
    assert (own / "notes.txt").read_text() == "mine"
    assert f"wrote {tmp_path / 'run/checkpoints/step-00000006'}," in capsys.readouterr().out
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "metrics.jsonl").write_text('{"accuracy": 1}\n')
    assert main(arguments(folder, tmp_path / "other")) == 1
    assert "metrics.jsonl is not this command's and would be overwritten" in one_line(capsys)
    assert (tmp_path / "other" / "metrics.jsonl").read_text() == '{"accuracy": 1}\n'


def test_a_loss_that_is_not_finite_stops_the_run(folder, whole, tmp_path, capsys, monkeypatch):
    forward = loop.Oput.forward

    def broken(self, corrupted):
        losses = forward(self, corrupted)
        # one micro batch of step 2: the first that comes
        if broken.step != 2 or broken.done:
            return losses
        broken.done = True
        parts = {**losses.parts, "loss_masked": losses.parts["loss_masked"] * torch.nan}
        return losses._replace(total=losses.total * torch.nan, parts=parts)

    def step(self, number, examples):
        broken.step, broken.trainer = number, self
        return trainer_step(self, number, examples)

    trainer_step = loop.Trainer.step
    broken.done = False
    monkeypatch.setattr(loop.Oput, "forward", broken)
    monkeypatch.setattr(loop.Trainer, "step", step)
    assert main(arguments(folder, tmp_path)) == 1
    message = one_line(capsys)
    assert "loss_masked is nan at step 2, which was not applied" in message
    assert message.count("walks.jsonl:") == 4  # the batch's records
    assert f"the last good checkpoint is {tmp_path / 'checkpoints' / 'step-00000002'}" in message
    assert [row["step"] for row in metrics(tmp_path)] == [0, 1, 2]
    assert_equal_weights(broken.trainer.objective.net.model.state_dict(), weights(tmp_path, 2))
    monkeypatch.undo()
    assert losses(train(folder, tmp_path)) == losses(metrics(whole))


def test_a_model_of_transformers_with_a_mask_token_given(folder, tmp_path, capsys):
    model = random_llama()
    model.config.mask_token_id = None
    model.save_pretrained(tmp_path / "llama")
    build_tokenizer().save_pretrained(tmp_path / "llama")
    more = ("--model", str(tmp_path / "llama"), "--block-length", "8", "--stop-after", "2")
    rows = train(folder, tmp_path, *more, "--mask-token-id", "3")
    assert sum(losses(rows)[-1]) < sum(losses(rows)[0])
    trained, _ = load_checkpoint(tmp_path / "checkpoints" / "step-00000002")
    assert trained.config.mask_token_id == 3  # the decoding loop finds it there
    ids = torch.tensor([[20, 21, 22]])
    output = spd_generate(trained, ids, block_length=8, max_new_tokens=5, ops="reference")
    assert output.sequences.shape == (1, 8)


def test_two_processes_give_the_losses_of_one(folder, whole, tmp_path):
    # FSDP2 over gloo; then one process continues from what two have written
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    result = subprocess.run(
        [*command, "-m", "dmax_kernels", *arguments(folder, tmp_path, "--stop-after", "3")],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "6 steps of 4 on 2 x cpu" in result.stdout
    assert result.stdout.count("wrote ") == 1
    rows = train(folder, tmp_path)
    assert_same_curves(rows, metrics(whole))
    for name, weight in weights(whole).items():
        torch.testing.assert_close(weights(tmp_path)[name], weight, rtol=0, atol=1e-3)
