"""Training: what is corrupted, what sees what, the two losses, resuming, and the whole pipeline."""

import json
from dataclasses import replace

import pytest
import torch

from dmax_kernels import reference
from dmax_kernels.__main__ import main
from dmax_kernels.models import ring_walk
from dmax_kernels.models.tiny_dlm import TinyDlmConfig, TinyDlmForCausalLM
from dmax_kernels.training import distill, mdlm, oput, stages, train
from dmax_kernels.training.corrupt import block_mask, uniform_mask
from dmax_kernels.training.data import (
    Batch,
    Example,
    batches,
    repeated_examples,
    ring_walk_examples,
)
from dmax_kernels.training.layout import Layout
from dmax_kernels.training.ops import select_ops
from dmax_kernels.training.optim import Muon, orthogonalize
from dmax_kernels.training.run_stage import run_stage
from dmax_kernels.training.state import write_atomically

BLOCK = 4
MASK = 1
SHORT = stages.Stage(
    name="short",
    start_from=None,
    data="ring_walk",
    objective="mdlm",
    num_moves=2,
    block_length=BLOCK,
    steps=20,
    muon_lr=0.02,
    adamw_lr=3e-3,
    decay_from=0.5,
    seed=7,
    batch_size=4,
    warmup_steps=2,
)


@pytest.fixture(autouse=True)
def one_thread():
    # As the command has it: the matrices are so small that a second thread mostly waits.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_model(block_length=BLOCK):
    torch.manual_seed(0)
    config = TinyDlmConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, block_length=block_length
    )
    model = TinyDlmForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def random_batch(rows=3, length=12, prompt_length=4):
    return Batch(torch.randint(4, 46, (rows, length), generator=generator(5)), prompt_length)


# Corruption


def test_block_mask_draws_a_count_for_each_block():
    editable = torch.ones(2000, 2 * BLOCK, dtype=torch.bool)
    counts = block_mask(editable, BLOCK, generator()).view(2000, 2, BLOCK).sum(-1)
    assert counts.min() == 1  # a block without a mask would teach nothing
    assert counts.max() == BLOCK
    share = torch.bincount(counts.flatten(), minlength=BLOCK + 1)[1:] / counts.numel()
    # 1/4 each; four standard errors of 4000 draws are 0.027
    torch.testing.assert_close(share, torch.full((BLOCK,), 1 / BLOCK), rtol=0, atol=0.028)
    assert not counts[:, 0].equal(counts[:, 1])


def test_a_prompt_is_never_masked():
    editable = torch.arange(12).expand(500, 12) >= 6  # the second block is half prompt
    assert not (block_mask(editable, BLOCK, generator()) & ~editable).any()
    assert block_mask(editable, BLOCK, generator())[:, 6:8].any(-1).all()
    for ratio in ((0.0, 1.0), (1.0, 1.0)):
        assert not (uniform_mask(editable, ratio, generator()) & ~editable).any()
    assert uniform_mask(editable, (1.0, 1.0), generator()).equal(editable)


def test_uniform_mask_has_its_ratio():
    editable = torch.ones(400, 100, dtype=torch.bool)
    fixed = uniform_mask(editable, (0.75, 0.75), generator()).float().mean(1)
    assert fixed.mean() == pytest.approx(0.75, abs=0.01)  # standard error 0.002
    assert fixed.std() == pytest.approx((0.75 * 0.25 / 100) ** 0.5, rel=0.2)
    drawn = uniform_mask(editable, (0.2, 0.8), generator()).float().mean(1)
    assert drawn.mean() == pytest.approx(0.5, abs=0.04)  # standard error 0.009
    assert drawn.std() > 0.15  # one level per row: uniform over 0.6 has 0.173


# Layout


@pytest.mark.parametrize(("length", "start", "num_noisy"), [(12, 4, 2), (8, 0, 1), (16, 12, 3)])
def test_the_layout_mask_is_its_definition(length, start, num_noisy):
    layout = Layout(length, start, BLOCK, num_noisy)
    places = [(part, p) for part in range(num_noisy) for p in range(start, length)]
    places += [("clean", p) for p in range(length - BLOCK)]
    mask = layout.attention_mask[0, 0]
    assert mask.shape == (len(places), len(places))
    assert layout.position_ids.tolist() == [[p for _, p in places]]
    for i, (query_part, query) in enumerate(places):
        for j, (key_part, key) in enumerate(places):
            same_block = query // BLOCK == key // BLOCK
            if query_part == key_part:
                visible = same_block or (key_part == "clean" and key // BLOCK < query // BLOCK)
            else:
                visible = key_part == "clean" and key // BLOCK < query // BLOCK
            assert bool(mask[i, j]) == visible, (i, j)


@torch.no_grad()
def test_the_layout_gives_what_decoding_block_by_block_gives():
    model, batch = random_model(), random_batch(length=16, prompt_length=8)
    noisy = [torch.randint(46, (3, 8), generator=generator(seed)) for seed in (1, 2)]
    layout = Layout(16, 8, BLOCK, num_noisy=2)
    logits = model(
        input_ids=layout.pack(noisy, batch.tokens),
        position_ids=layout.position_ids,
        attention_mask=layout.attention_mask,
    ).logits
    for part, tokens in zip(layout.noisy_parts(logits), noisy, strict=True):
        for block in range(2):
            first = 8 + block * BLOCK
            live = tokens[:, block * BLOCK : (block + 1) * BLOCK]
            sequence = torch.cat([batch.tokens[:, :first], live], 1)
            torch.testing.assert_close(
                part[:, block * BLOCK : (block + 1) * BLOCK],
                model(input_ids=sequence).logits[:, first:],
                rtol=1e-4,
                atol=1e-4,
            )


# Data


def test_batches_hold_whole_blocks_that_end_in_eos():
    stream = batches(ring_walk_examples(4, 16, 0), 16, 8)
    for _, batch in zip(range(20), stream, strict=False):
        assert batch.prompt_length == 16
        assert batch.tokens.shape[0] == 8
        assert batch.tokens.shape[1] % 16 == 0
        for row in batch.response.tolist():
            end = row.index(ring_walk.EOS_ID)
            assert len(row) - end <= 16, "a block beyond the one with the first eos is not learnt"
            assert set(row[end:]) == {ring_walk.EOS_ID}


def test_every_example_comes_once_an_epoch():
    examples = [Example((i,), (2,)) for i in range(10)]
    stream = repeated_examples(examples, seed=0)
    epochs = [[next(stream).prompt[0] for _ in range(10)] for _ in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(10))
    assert epochs[0] != epochs[1]


# Losses


def test_the_mdlm_loss_is_the_mean_over_masked_positions():
    model, batch = random_model(), random_batch()
    loss = mdlm.mdlm_loss(model, batch, generator(3), ops="reference")
    # By hand: the same draws, one forward pass per corruption and block.
    draws, total, count = generator(3), 0.0, 0
    editable = torch.ones(3, 8, dtype=torch.bool)
    masks = [block_mask(editable, BLOCK, draws) for _ in range(2)]
    for masked in masks:
        for first in range(4, 12, BLOCK):
            sequence = batch.tokens[:, : first + BLOCK].clone()
            block_masked = masked[:, first - 4 : first - 4 + BLOCK]
            sequence[:, first:][block_masked] = MASK
            log_p = model(input_ids=sequence).logits[:, first:].log_softmax(-1)
            target = batch.tokens[:, first : first + BLOCK]
            total -= log_p.gather(-1, target[..., None])[..., 0][block_masked].sum()
            count += int(block_masked.sum())
    torch.testing.assert_close(loss, total / count, rtol=1e-5, atol=0)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_oput_loss_is_equations_3_to_6(temperature):
    model, batch = random_model(), random_batch()
    loss = oput.oput_step_loss(
        model, batch, generator(3), ops="reference", mask_ratio=(0.5, 1.0), temperature=temperature
    )
    # By hand, block by block and one pass at a time.
    draws = generator(3)
    masked = uniform_mask(torch.ones(3, 8, dtype=torch.bool), (0.5, 1.0), draws)
    seed = torch.randint(2**62, (2,), generator=draws)

    def log_p(response):
        parts = []
        for first in range(0, 8, BLOCK):
            clean = batch.tokens[:, : 4 + first]
            sequence = torch.cat([clean, response[:, first : first + BLOCK]], 1)
            parts.append(model(input_ids=sequence).logits[:, -BLOCK:])
        return torch.cat(parts, 1).log_softmax(-1)

    x_masked = batch.response.masked_fill(masked, MASK)
    with torch.no_grad():
        p = log_p(x_masked)[masked]
        p[:, MASK] = -torch.inf
        if temperature == 0:
            drawn = p.argmax(-1)
        else:
            drawn, _ = reference.sample_tokens(p, seed)
    x_predicted = x_masked.clone()
    x_predicted[masked] = drawn
    assert (x_predicted != batch.response).any()
    assert (x_predicted != MASK).all()
    expected = sum(
        -log_p(x).gather(-1, batch.response[..., None]).sum() for x in (x_masked, x_predicted)
    )
    torch.testing.assert_close(loss, expected / masked.numel(), rtol=1e-5, atol=0)


def test_the_rollout_carries_no_gradient_and_follows_the_parameters():
    model, batch = random_model(), random_batch()
    masked = torch.ones_like(batch.response, dtype=torch.bool)
    seed = torch.tensor([0, 0])
    first = oput.rollout(model, batch, masked, seed, temperature=0.0, ops="reference")[1]
    with torch.no_grad():  # prefer one word by changing the parameters
        model.lm_head.weight.zero_()
    second = oput.rollout(model, batch, masked, seed, temperature=0.0, ops="reference")[1]
    assert first.grad_fn is None
    assert not first.equal(second)
    assert set(second.flatten().tolist()) == {0}  # all equal: the lowest id


@pytest.mark.parametrize("objective", ["mdlm", "oput"])
def test_fused_and_reference_ops_give_the_same_losses_and_gradients(objective):
    values = {}
    for ops in ("reference", "fused"):
        model, batch = random_model(), random_batch()
        if objective == "mdlm":
            loss = mdlm.mdlm_loss(model, batch, generator(3), ops=ops)
        else:
            loss = oput.oput_step_loss(model, batch, generator(3), ops=ops, temperature=1.0)
        loss.backward()
        values[ops] = [loss.detach(), *(p.grad for p in model.parameters())]
    for fused, expected in zip(values["fused"], values["reference"], strict=True):
        torch.testing.assert_close(fused, expected, rtol=1e-5, atol=1e-6)


def test_select_ops_names_the_choices():
    assert select_ops("reference") is reference
    with pytest.raises(ValueError, match='ops must be "reference" or "fused", got \'fast\''):
        select_ops("fast")


# Optimizers


@pytest.mark.parametrize("shape", [(16, 16), (64, 16), (16, 64), (3, 16, 16)])
def test_orthogonalize_brings_singular_values_near_one(shape):
    matrix = torch.randn(shape, generator=generator())
    values = torch.linalg.svdvals(orthogonalize(matrix))
    # The quintic is tuned for a steep start and leaves 0.7..1.2; a square Gaussian matrix has
    # singular values near 0, of which five steps lift all but the smallest.
    assert values.max() < 1.25
    assert values.median() > 0.65
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    alignment = (orthogonalize(matrix) * (u @ v)).sum((-2, -1)) / min(shape[-2:])
    assert alignment.min() > 0.65


def test_muon_descends():
    weight = torch.nn.Parameter(torch.randn(8, 4, generator=generator()))
    target = torch.randn(8, 4, generator=generator(1))
    optimizer = Muon([weight], lr=0.05)
    before = (weight - target).square().mean().item()
    for _ in range(60):
        optimizer.zero_grad()
        (weight - target).square().mean().backward()
        optimizer.step()
    assert (weight - target).square().mean().item() < 0.05 * before


def test_learning_rates_warm_up_stay_and_fall():
    factors = [SHORT.learning_rate_factor(step) for step in range(20)]
    assert factors[:3] == [0.5, 1.0, 1.0]
    assert factors[10:12] == [1.0, 0.9]
    assert factors[19] == pytest.approx(0.1)


# Stages, files and the command


def short_run(path, **arguments):
    torch.manual_seed(0)
    model = TinyDlmForCausalLM(TinyDlmConfig(block_length=BLOCK))
    return run_stage(SHORT, model, train.stage_batches(SHORT, None), path, **arguments)


def test_the_loss_falls_and_a_resumed_run_is_the_same_bit_for_bit(tmp_path):
    whole = short_run(tmp_path / "whole.pt")
    assert len(whole["losses"]) == SHORT.steps
    assert sum(whole["losses"][-3:]) < 0.9 * sum(whole["losses"][:3])
    short_run(tmp_path / "resumed.pt", stop_after=7)
    resumed = short_run(tmp_path / "resumed.pt")
    assert resumed["losses"] == whole["losses"]
    for name, weight in whole["model"].items():
        assert weight.equal(resumed["model"][name]), name
    again = short_run(tmp_path / "whole.pt")  # finished: nothing is trained anew
    assert again["losses"] == whole["losses"]


def test_a_stage_is_not_resumed_under_other_numbers(tmp_path):
    short_run(tmp_path / "short.pt", stop_after=1)
    other = replace(SHORT, muon_lr=0.5)
    with pytest.raises(
        ValueError, match=r"short.pt must be of a stage with muon_lr = 0.5, got 0.02"
    ):
        run_stage(other, random_model(), iter([]), tmp_path / "short.pt")


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "state.pt"
    path.write_text("old")

    def half_write(file):
        file.write_text("ha")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, half_write)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["state.pt"]


def test_distillation_resumes_and_drops_incomplete_responses(tmp_path):
    model = random_model(block_length=32).eval()
    settings = stages.Distillation(
        problems=6, num_moves=6, threshold=0.0, batch_size=2, seed=0
    )  # an untrained model writes noise: threshold 0 takes it in one pass a block
    path = tmp_path / "distillation.pt"
    whole = distill.distill(settings, model, path)
    assert len(whole["responses"]) == 6
    saved = torch.load(path)
    saved["responses"] = saved["responses"][:2]
    torch.save(saved, path)
    assert distill.distill(settings, model, path)["responses"] == whole["responses"]

    written = [[20, 2], [], [21, 21, 2], [], [], [2]]
    examples = distill.distilled_examples(settings, written, 32)
    assert [list(example.response) for example in examples] == [r for r in written if r]
    with pytest.raises(ValueError, match="complete at least one response, got none in 6"):
        distill.distilled_examples(settings, [[]] * 6, 32)


def test_the_whole_pipeline(tmp_path, monkeypatch, capsys):
    """A few steps of every stage: the checkpoints and the log are written, and found again."""
    for name in ("BASE_BLOCK16", "BASE", "OPUT", "CONTROL"):
        stage = replace(getattr(stages, name), steps=2, batch_size=1)
        monkeypatch.setattr(train, name, stage)
    settings = replace(stages.DISTILLATION, problems=8, threshold=0.0)
    monkeypatch.setattr(train, "DISTILLATION", settings)
    monkeypatch.setattr(train, "EVALUATION_PROBLEMS", 2)
    rows = dict.fromkeys(train.EVALUATIONS, (("threshold", 0.0), ("spd", 0.0)))
    monkeypatch.setattr(train, "EVALUATIONS", rows)
    # Two steps teach no model to end a response.
    monkeypatch.setattr(
        train,
        "distilled_examples",
        lambda settings, responses, block_length: [
            example
            for example, _ in zip(ring_walk_examples(6, block_length, 0), responses, strict=False)
        ],
    )
    arguments = ["train", "--output", str(tmp_path / "out")]
    assert main(arguments) == 0
    out = tmp_path / "out"
    names = {path.name for path in out.iterdir()}
    assert names == {"base", "oput", "control", "training_log.json", "state"}
    log = json.loads((out / "training_log.json").read_text())
    assert log["command"].startswith("python -m dmax_kernels train")
    assert set(log["stages"]) == {"base_block16", "base", "oput", "control"}
    assert log["stages"]["oput"]["steps"] == 2
    assert log["distillation"]["kept"] == 8
    assert {row["rule"] for row in log["evaluation"]["oput"]} == {"spd", "threshold"}
    assert main(arguments) == 0
    assert json.loads((out / "training_log.json").read_text()) == log
    assert str(tmp_path) not in json.dumps(log)


def test_the_command_tells_a_mistake_in_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    state = tmp_path / "run" / "state"
    state.mkdir(parents=True)
    torch.save({"stage": {}}, state / "base_block16.pt")
    cases = [
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (["--output", str(tmp_path / "file")], "--output must be a folder, got the file"),
        (["--output", str(tmp_path / "file" / "below")], "file"),
        (["--output", str(tmp_path / "run")], "base_block16.pt must be of a stage with name"),
    ]
    for arguments, message in cases:
        assert main(["train", *arguments]) == 1
        captured = capsys.readouterr().err
        assert message in captured
        assert "Traceback" not in captured
        assert len(captured.strip().splitlines()) == 1
    with pytest.raises(SystemExit):
        main(["train", "--ops", "fast"])
    assert "invalid choice: 'fast'" in capsys.readouterr().err


def test_an_interrupted_command_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train", interrupted)
    assert main(["train", "--output", str(tmp_path)]) == 130
    assert "the same command goes on" in capsys.readouterr().err
