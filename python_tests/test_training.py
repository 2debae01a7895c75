"""What is corrupted, what sees what, the two losses, the optimizers and the schedules."""

import math
from dataclasses import replace

import pytest
import torch
from training_models import BLOCK, MASK, generator, random_llama, random_model

from dmax_kernels import reference
from dmax_kernels.training.config import TrainConfig
from dmax_kernels.training.data import Example, collate
from dmax_kernels.training.layout import Layout, attention_mask
from dmax_kernels.training.loop import build_objective
from dmax_kernels.training.model import DenoisingModel
from dmax_kernels.training.optim import (
    MasterWeights,
    Muon,
    build_optimizers,
    learning_rate_factor,
    orthogonalize,
)
from dmax_kernels.training.oput import IGNORE, Mdlm, Oput, block_mask, uniform_mask
from dmax_kernels.training.prepare import build_net

CPU = torch.device("cpu")
EOS = 2


@pytest.fixture(autouse=True)
def one_thread():
    # The matrices are so small that a second thread mostly waits.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def numbers(**changes):
    return TrainConfig(**{"block_length": BLOCK, "ops": "reference", "steps": 20, **changes})


def random_batch(eos_tail="block"):
    """Prompts that end on a block's edge, inside a block and at once; four lengths."""
    shapes = ((4, 8), (6, 3), (0, 5), (5, 4))
    ids = torch.randint(4, 46, (4, 12), generator=generator(5)).tolist()
    examples = [
        Example(tuple(row[:p]), (*row[p : p + r - 1], EOS), f"row {i}")
        for i, (row, (p, r)) in enumerate(zip(ids, shapes, strict=True))
    ]
    return examples, collate(examples, BLOCK, EOS, eos_tail)


def oput(model, ops=reference, **options):
    return Oput(DenoisingModel(model), ops, **options)


def mdlm(model, ops=reference):
    return Mdlm(DenoisingModel(model), ops)


OBJECTIVES = {"oput": oput, "mdlm": mdlm}


def losses_of(objective, corrupted, rows=range(4)):
    return objective(corrupted.rows(list(rows), CPU))


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
    mask = attention_mask(layout, "sdpa", CPU)[0, 0]
    assert mask.dtype == torch.bool
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


def test_a_mask_is_built_once_per_shape():
    masks = [attention_mask(Layout(12, 4, BLOCK, 2), "sdpa", CPU) for _ in range(2)]
    assert masks[0] is masks[1]
    with pytest.raises(ValueError, match="start must be a multiple of block_length 4, got 6"):
        Layout(12, 6, BLOCK, 2)


@pytest.mark.parametrize("make", [random_model, random_llama])
@torch.no_grad()
def test_flex_attention_sees_what_the_boolean_mask_shows(make):
    # Forward alone: FlexAttention has no backward pass on a CPU, which build_net says. And without
    # the compiler: on AVX2, torch 2.13's CPU template gives wrong numbers or NaN at 24 tokens, also
    # where every key is seen
    model = make()
    clean = torch.randint(4, 46, (2, 12), generator=generator(1))
    noisy = [torch.randint(4, 46, (2, 8), generator=generator(seed)) for seed in (2, 3)]
    layout = Layout(12, 4, BLOCK, 2)
    hidden = {}
    for attention, name in (("sdpa", "sdpa"), ("flex", "flex_attention")):
        model.config._attn_implementation = name
        net = DenoisingModel(model)
        assert net.attention == attention
        with torch.compiler.set_stance("force_eager"):
            hidden[attention] = torch.stack(net(layout, noisy, clean))
    torch.testing.assert_close(hidden["flex"], hidden["sdpa"], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="attention must be sdpa on a CPU .* got flex"):
        build_net(model, numbers(attention="flex"), CPU)


# Losses, by hand: one row, one block and one pass at a time


def log_p(model, clean, response, start):
    """log p of each token from `start` on, each block after the clean tokens before it."""
    parts = []
    for first in range(start, len(clean), BLOCK):
        block = response[first - start : first - start + BLOCK]
        logits = model(input_ids=torch.cat([clean[:first], block])[None]).logits
        parts.append(logits[0, -BLOCK:])
    return torch.cat(parts).log_softmax(-1)


def by_hand(model, batch, response, start, learnt):
    """-sum of log p of the clean tokens where `learnt`."""
    total = 0.0
    for clean, noisy, chosen in zip(batch.tokens, response, learnt, strict=True):
        p = log_p(model, clean, noisy, start)
        total -= p.gather(-1, clean[start:, None])[chosen].sum()
    return total


@pytest.mark.parametrize("eos_tail", ["block", "released"])
def test_the_mdlm_loss_is_the_sum_over_masked_positions(eos_tail):
    model = random_model()
    _, batch = random_batch(eos_tail)
    objective = mdlm(model)
    corrupted = objective.corrupt(batch, seed=3, step=0)
    loss, absent = losses_of(objective, corrupted)
    assert absent is None
    assert len(corrupted.masks) == 2
    expected, count, start = 0.0, 0, batch.start
    for masked in corrupted.masks:
        assert not (masked & ~batch.editable).any()
        noisy, learnt = batch.tokens.masked_fill(masked, MASK), masked & (batch.target != IGNORE)
        expected = expected + by_hand(model, batch, noisy[:, start:], start, learnt[:, start:])
        count += int(learnt.sum())
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert corrupted.num_learnt == count


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_oput_losses_are_equations_3_to_5(temperature):
    model = random_model()
    with torch.no_grad():  # the mask token is likely, and never drawn
        model.lm_head.weight[MASK] = 2 * model.lm_head.weight[20]
    _, batch = random_batch()
    objective = oput(model, mask_ratio=(0.5, 1.0), rollout_temperature=temperature)
    corrupted = objective.corrupt(batch, seed=0, step=7)
    losses = losses_of(objective, corrupted)

    assert not (corrupted.masks[0] & ~batch.editable).any()  # never the prompt
    start = batch.start
    masked, seeds = corrupted.masks[0][:, start:], corrupted.seeds[:, start:]
    clean = batch.tokens[:, start:]
    noisy_masked = clean.masked_fill(masked, MASK)
    noisy_predicted = noisy_masked.clone()
    with torch.no_grad():
        for i, row in enumerate(noisy_masked):
            p = log_p(model, batch.tokens[i], row, start)[masked[i]]
            p[:, MASK] = -torch.inf
            drawn, *_ = reference.sample_tokens(p, seeds[i][masked[i]], temperature=temperature)
            noisy_predicted[i, masked[i]] = drawn
    assert (noisy_predicted != clean).any()
    assert (noisy_predicted != MASK).all()
    learnt = batch.target[:, start:] != IGNORE
    for loss, noisy in zip(losses, (noisy_masked, noisy_predicted), strict=True):
        expected = by_hand(model, batch, noisy, start, learnt)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert corrupted.num_learnt == int(learnt.sum())


def test_alternating_steps_are_the_two_passes_of_joint_ones():
    model = random_model()
    _, batch = random_batch()

    def losses(alternating, step):
        objective = oput(model, alternating=alternating)
        passes = objective.corrupt(batch, seed=0, step=step).passes
        corrupted = replace(objective.corrupt(batch, seed=0, step=7), passes=passes)
        return losses_of(objective, corrupted)

    joint, even, odd = losses(False, 0), losses(True, 0), losses(True, 1)
    assert even[1] is None
    assert odd[0] is None
    torch.testing.assert_close((even[0], odd[1]), joint, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_micro_batches_change_nothing(name):
    # The rows beside a row change its padding, its start and its place, but not its draws
    model = random_model()
    _, batch = random_batch()
    objective = OBJECTIVES[name](model)
    corrupted = objective.corrupt(batch, seed=0, step=7)
    values = []
    for split in ([[0, 1, 2, 3]], [[3], [1, 0], [2]]):
        model.zero_grad()
        for rows in split:
            losses = losses_of(objective, corrupted, rows)
            sum(loss for loss in losses if loss is not None).backward()
        values.append([p.grad for p in model.parameters()])
    for whole, parts in zip(*values, strict=True):
        torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-5)


def test_the_rollout_carries_no_gradient_and_follows_the_parameters():
    model = random_model()
    objective, (_, batch) = oput(model, rollout_temperature=0.0), random_batch()
    corrupted = objective.corrupt(batch, seed=0, step=0)
    masked = corrupted.masks[0][:, batch.start :]
    (noisy,) = objective.masked_inputs(corrupted)
    assert noisy.equal(batch.tokens[:, batch.start :].masked_fill(masked, MASK))

    def roll():
        return objective.rollout(corrupted, noisy)

    first = roll()
    assert first.grad_fn is None
    assert objective.net.training
    assert first[~masked].equal(noisy[~masked])
    with torch.no_grad():  # prefer one word by changing the parameters
        model.lm_head.weight.zero_()
    assert set(roll()[masked].tolist()) == {0}  # all equal: the lowest id


def test_a_step_without_a_mask_has_nothing_to_roll_out():
    model = random_model()
    _, batch = random_batch()
    objective = oput(model, mask_ratio=(0.0, 1e-9))
    corrupted = objective.corrupt(batch, seed=0, step=0)
    assert not corrupted.masks[0].any()
    masked, predicted = losses_of(objective, corrupted, [0, 1])
    torch.testing.assert_close(masked, predicted)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_fused_and_reference_ops_give_the_same_losses_and_gradients(name):
    values = {}
    _, batch = random_batch()
    for ops in ("reference", "fused"):
        model = random_model()
        objective = build_objective(model, numbers(objective=name, ops=ops), CPU)
        losses = losses_of(objective, objective.corrupt(batch, seed=0, step=3))
        sum(loss for loss in losses if loss is not None).backward()
        values[ops] = [p.grad for p in model.parameters()]
    for fused, expected in zip(values["fused"], values["reference"], strict=True):
        torch.testing.assert_close(fused, expected, rtol=1e-4, atol=1e-5)


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
    def factors(schedule, **changes):
        config = numbers(schedule=schedule, warmup_steps=2, steps=20, **changes)
        return [learning_rate_factor(config, step) for step in range(20)]

    linear = factors("linear", decay_from=0.5)
    assert linear[:3] == [0.5, 1.0, 1.0]
    assert linear[10:12] == [1.0, 0.9]
    assert linear[19] == pytest.approx(0.1)
    cosine = factors("cosine")
    assert cosine[:3] == [0.5, 1.0, 1.0]
    assert cosine[11] == pytest.approx(0.5)
    assert cosine[19] == pytest.approx((1 + math.cos(math.pi * 17 / 18)) / 2)
    assert factors("constant") == [0.5] + [1.0] * 19
    assert learning_rate_factor(numbers(warmup_steps=0, steps=1), 0) == 1.0


def test_muon_takes_the_matrices_of_the_layers():
    model = random_model()
    parameters = dict(model.named_parameters())
    layers = {name for name in parameters if ".layers." in name}
    muon, adamw = build_optimizers(numbers(optimizer="muon"), parameters, layers)
    assert len(muon.param_groups[0]["params"]) == len(layers)
    assert len(adamw.param_groups[0]["params"]) == 2
    (adamw,) = build_optimizers(numbers(), parameters, layers)
    assert len(adamw.param_groups[0]["params"]) == len(parameters)


def test_master_weights_keep_what_bfloat16_rounds_away():
    net = build_net(random_model(), numbers(precision="bf16-master"), CPU)
    before = {name: p.detach().clone() for name, p in net.model.named_parameters()}
    masters = MasterWeights(net.model)
    name = "lm_head.weight"
    weight = net.model.lm_head.weight
    assert weight.dtype == torch.bfloat16
    assert masters.named[name].equal(before[name])  # taken before the rounding
    for _ in range(3):  # micro batches
        weight.grad = torch.full_like(weight, 1.0)
        masters.take_gradients()
    assert weight.grad is None
    assert masters.named[name].grad.dtype == torch.float32
    assert masters.named[name].grad.equal(torch.full_like(before[name], 3.0))
    with torch.no_grad():
        masters.named[name].add_(1e-6)
    masters.publish()
    assert weight.equal(before[name].add(1e-6).bfloat16())
    assert not masters.named[name].equal(before[name])
