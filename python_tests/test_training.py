"""The losses of every objective; what is corrupted is in test_training_masks.py."""

import functools
from dataclasses import replace

import pytest
import torch
from linear_losses import dmax_calls
from training_models import BLOCK, MASK, generator, random_model

import dmax_kernels
from dmax_kernels import reference
from dmax_kernels.training.baselines import Certainty, Mdlm, Uniform
from dmax_kernels.training.config import TrainConfig
from dmax_kernels.training.corrupt import IGNORE
from dmax_kernels.training.data import Example, collate
from dmax_kernels.training.loop import build_objective
from dmax_kernels.training.model import DenoisingModel
from dmax_kernels.training.oput import Oput, Recipe

CPU = torch.device("cpu")
EOS = 2


pytestmark = pytest.mark.usefixtures("one_thread")


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


def build(kind, model, ops=reference, **recipe):
    return kind(DenoisingModel(model), ops, Recipe(**recipe))


def oput(model, **recipe):
    return build(Oput, model, **recipe)


OBJECTIVES = {
    "oput": Oput,
    "uniform": Uniform,
    "mdlm": Mdlm,
    "certainty": Certainty,
}


def losses_of(objective, corrupted, rows=range(4)):
    """By name; and as they were added up, which is what has a gradient."""
    total, parts = objective(corrupted.rows(list(rows), CPU))
    torch.testing.assert_close(total.detach(), sum(parts.values()))
    assert not any(part.requires_grad for part in parts.values())
    return parts


def total_of(objective, corrupted, rows=range(4)):
    return objective(corrupted.rows(list(rows), CPU)).total


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
    objective = build(Mdlm, model, mask_level="block")
    corrupted = objective.corrupt(batch, seed=3, step=0)
    losses = losses_of(objective, corrupted)
    assert list(losses) == ["loss_masked"]
    assert len(corrupted.masks) == 2
    expected, count, start = 0.0, 0, batch.start
    for masked in corrupted.masks:
        assert not (masked & ~batch.editable).any()
        noisy, learnt = batch.tokens.masked_fill(masked, MASK), masked & (batch.target != IGNORE)
        expected = expected + by_hand(model, batch, noisy[:, start:], start, learnt[:, start:])
        count += int(learnt.sum())
    torch.testing.assert_close(losses["loss_masked"], expected, rtol=1e-5, atol=0)
    assert corrupted.divisor == count


@pytest.mark.parametrize("level", ["sequence", "block"])
def test_the_inverse_weight_is_equation_1(level):
    """Each masked position weighs 1 / t, over the number of learnt positions."""
    model = random_model()
    _, batch = random_batch()
    recipe = {"mask_level": level, "mask_ratio": (0.0, 1.0), "mask_weight": "inverse"}
    objective = build(Mdlm, model, **recipe)
    corrupted = objective.corrupt(batch, seed=3, step=0)
    start, expected = batch.start, 0.0
    for masked, weight in zip(corrupted.masks, corrupted.weights, strict=True):
        noisy, learnt = batch.tokens.masked_fill(masked, MASK), masked & (batch.target != IGNORE)
        if level == "block":  # t is the share of the block that is masked
            blocks = [each.view(4, -1, BLOCK).sum(-1) for each in (masked, batch.editable)]
            t = (blocks[0] / blocks[1]).repeat_interleave(BLOCK, 1)
            torch.testing.assert_close(weight[masked], 1 / t[masked])
        else:  # one t for a row
            assert all(len(row[row > 0].unique()) <= 1 for row in weight)
        for value in weight[learnt].unique():
            chosen = learnt & (weight == value)
            part = by_hand(model, batch, noisy[:, start:], start, chosen[:, start:])
            expected = expected + value * part
    loss = losses_of(objective, corrupted)["loss_masked"]
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert corrupted.divisor == 2 * int(batch.learnt.sum())


@pytest.mark.parametrize("level", ["sequence", "block"])
def test_the_inverse_weight_is_unbiased(level):
    """Every position's weight averages 1: the loss estimates that of all positions."""
    batch = collate([Example((), tuple(range(4, 12)), "")] * 400, BLOCK, EOS, "block")
    recipe = {"mask_level": level, "mask_ratio": (0.2, 1.0), "mask_weight": "inverse"}
    objective = build(Mdlm, random_model(), **recipe)
    weights = torch.stack(objective.corrupt(batch, seed=0, step=0).weights)
    assert weights.mean() == pytest.approx(1.0, abs=0.05)  # standard error about 0.015


def test_sequences_average_the_means_of_sequences():
    model = random_model()
    _, batch = random_batch()
    joint = build(Mdlm, model, mask_level="block", loss_average="sequences")
    corrupted = joint.corrupt(batch, seed=3, step=0)
    loss = losses_of(joint, corrupted)["loss_masked"] / corrupted.divisor
    means = []
    plain = build(Mdlm, model, mask_level="block")
    for row in range(4):
        alone = plain.corrupt(batch, seed=3, step=0).rows([row], CPU)
        counted = sum((each & alone.batch.learnt).sum() for each in alone.masks)
        means.append(losses_of(plain, alone, [0])["loss_masked"] / counted)
    torch.testing.assert_close(loss, torch.stack(means).mean(), rtol=1e-5, atol=0)


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
    for loss, noisy in zip(losses.values(), (noisy_masked, noisy_predicted), strict=True):
        expected = by_hand(model, batch, noisy, start, learnt)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert list(losses) == ["loss_masked", "loss_predicted"]
    assert corrupted.divisor == int(learnt.sum())


def test_the_uniform_loss_is_equation_2():
    model = random_model()
    _, batch = random_batch()
    objective = build(Uniform, model, mask_ratio=(0.5, 1.0))
    corrupted = objective.corrupt(batch, seed=0, step=7)
    (noisy_masked,) = objective.masked_inputs(corrupted)
    noisy = objective.fill(corrupted, noisy_masked)
    masked = corrupted.masks[0][:, batch.start :]
    assert noisy[~masked].equal(batch.tokens[:, batch.start :][~masked])
    assert (noisy != MASK).all()
    losses = losses_of(objective, corrupted)
    learnt = batch.learnt[:, batch.start :]  # all of them, replaced or not
    expected = by_hand(model, batch, noisy, batch.start, learnt)
    torch.testing.assert_close(losses["loss_uniform"], expected, rtol=1e-5, atol=0)
    alone = build(Uniform, model, mask_ratio=(0.5, 1.0), passes="second")
    only = losses_of(alone, alone.corrupt(batch, seed=0, step=7))
    assert list(only) == ["loss_uniform"]
    torch.testing.assert_close(only["loss_uniform"], expected, rtol=1e-5, atol=0)


def test_uniform_tokens_are_uniform():
    """Every token but the mask, equally often: a chi-squared test at one in a million."""
    objective = build(Uniform, random_model(), mask_ratio=(1.0, 1.0))
    batch = collate([Example((), (20,) * 40, "")] * 100, BLOCK, EOS, "block")
    corrupted = objective.corrupt(batch, seed=1, step=0)
    (noisy,) = objective.masked_inputs(corrupted)
    drawn = objective.fill(corrupted, noisy)
    counts = torch.bincount(drawn.flatten(), minlength=objective.net.vocabulary)
    assert counts[MASK] == 0
    others = counts[torch.arange(len(counts)) != MASK].double()
    expected = others.sum() / len(others)
    degrees = len(others) - 1
    chi_squared = ((others - expected) ** 2 / expected).sum()
    assert chi_squared < degrees + 5 * (2 * degrees) ** 0.5
    again = objective.fill(corrupted.rows(range(50, 100), CPU), noisy[50:])
    assert again.equal(drawn[50:])  # a draw does not depend on the rows beside it


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_certainty_loss_adds_entropy_where_the_model_is_right(temperature):
    model = random_model()
    _, batch = random_batch()
    recipe = {"certainty_beta": 2.0, "certainty_temperature": temperature}
    objective = build(Certainty, model, mask_level="block", **recipe)
    corrupted = objective.corrupt(batch, seed=3, step=0)
    losses = losses_of(objective, corrupted)
    plain = losses_of(build(Mdlm, model, mask_level="block"), corrupted)
    torch.testing.assert_close(losses["loss_masked"], plain["loss_masked"], rtol=1e-5, atol=0)
    expected, right = 0.0, 0
    for masked in corrupted.masks:
        noisy = batch.tokens.masked_fill(masked, MASK)[:, batch.start :]
        for row, clean in enumerate(batch.tokens):
            p = log_p(model, clean, noisy[row], batch.start)
            at = (masked & batch.learnt)[row, batch.start :] & (
                p.argmax(-1) == clean[batch.start :]
            )
            sharp = (p[at] / temperature).softmax(-1)
            expected = expected - 2.0 * torch.special.xlogy(sharp, sharp).sum()
            right += int(at.sum())
    assert right > 0
    torch.testing.assert_close(losses["loss_certainty"], expected, rtol=1e-5, atol=0)


def test_alternating_steps_are_the_two_passes_of_joint_ones():
    model = random_model()
    _, batch = random_batch()

    def losses(passes, step):
        objective = oput(model, passes=passes)
        passes = objective.corrupt(batch, seed=0, step=step).passes
        corrupted = replace(objective.corrupt(batch, seed=0, step=7), passes=passes)
        return losses_of(objective, corrupted)

    joint, even, odd = losses("joint", 0), losses("alternating", 0), losses("alternating", 1)
    assert list(even) == ["loss_masked"]
    assert list(odd) == ["loss_predicted"]
    torch.testing.assert_close({**even, **odd}, joint, rtol=1e-5, atol=0)
    second = losses("second", 0)
    torch.testing.assert_close(second, odd, rtol=1e-5, atol=0)


def test_alternating_steps_can_share_their_masks():
    _, batch = random_batch()
    masks = {}
    for share in (False, True):
        objective = oput(random_model(), passes="alternating", share_masks=share)
        drawn = [objective.corrupt(batch, seed=0, step=step) for step in (6, 7, 8)]
        assert [each.passes for each in drawn] == [(True, False), (False, True), (True, False)]
        masks[share] = [each.masks[0] for each in drawn]
    assert masks[True][0].equal(masks[False][0])
    assert masks[True][1].equal(masks[True][0])
    assert not masks[False][1].equal(masks[False][0])
    assert not masks[True][2].equal(masks[True][0])


@pytest.mark.parametrize("average", ["tokens", "sequences"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_micro_batches_change_nothing(name, average):
    # The rows beside a row change its padding, its start and its place, but not its draws
    model = random_model()
    _, batch = random_batch()
    objective = build(OBJECTIVES[name], model, loss_average=average)
    corrupted = objective.corrupt(batch, seed=0, step=7)
    values = []
    for split in ([[0, 1, 2, 3]], [[3], [1, 0], [2]]):
        model.zero_grad()
        for rows in split:
            total_of(objective, corrupted, rows).backward()
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
        return objective.fill(corrupted, noisy)

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
    masked, predicted = losses_of(objective, corrupted, [0, 1]).values()
    torch.testing.assert_close(masked, predicted)


@pytest.mark.parametrize("average", ["tokens", "sequences"])
@pytest.mark.parametrize("name", ["oput", "uniform", "mdlm"])
def test_a_step_takes_three_products_with_the_head(name, average):
    """Losses and gradients are those of four products: one for single losses, three backward."""
    _, batch = random_batch()
    values, calls = [], []
    for four in (False, True):
        model = random_model()
        objective = build(OBJECTIVES[name], model, dmax_kernels, loss_average=average)
        if four:
            objective.summed_losses = functools.partial(sums_of_single_losses, objective)
        corrupted = objective.corrupt(batch, seed=0, step=3).rows([0, 1, 2, 3], CPU)
        with dmax_calls() as names:
            total, parts = objective(corrupted)
            total.backward()
        calls.append([each for each in names if each.startswith("linear_oput")])
        values.append([*parts.values(), *(p.grad for p in model.parameters())])
    assert calls[0][0] == "linear_oput_loss_sum"
    assert set(calls[0][1:]) == {"linear_oput_loss_scale_"}  # no product
    assert calls[1] == ["linear_oput_loss", "linear_oput_loss_backward"]
    for three, four in zip(*values, strict=True):
        torch.testing.assert_close(three, four, rtol=1e-5, atol=1e-6)


def sums_of_single_losses(objective, masked, second, target, token_weight=None):
    weight, bias = objective.net.head()
    losses = dmax_kernels.linear_oput_loss(
        masked, second, weight, target, bias=bias, token_weight=token_weight
    )
    sums = [target.new_zeros(()) if loss is None else loss.sum() for loss in losses]
    return sums[0] + sums[1], torch.stack([each.detach() for each in sums])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_fused_and_reference_ops_give_the_same_losses_and_gradients(name):
    values = {}
    _, batch = random_batch()
    for ops in ("reference", "fused"):
        model = random_model()
        objective = build_objective(model, numbers(objective=name, ops=ops), CPU)
        total_of(objective, objective.corrupt(batch, seed=0, step=3)).backward()
        values[ops] = [p.grad for p in model.parameters()]
    for fused, expected in zip(values["fused"], values["reference"], strict=True):
        torch.testing.assert_close(fused, expected, rtol=1e-4, atol=1e-5)
