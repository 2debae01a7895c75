"""The optimizers, the weights that they step, and the learning rates over a run."""

import math

import pytest
import torch
from training_models import BLOCK, generator, random_model

from dmax_kernels.training.config import TrainConfig
from dmax_kernels.training.optim import (
    MasterWeights,
    Muon,
    build_optimizers,
    learning_rate_factor,
    orthogonalize,
)
from dmax_kernels.training.prepare import build_net

CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("one_thread")


def numbers(**changes):
    return TrainConfig(**{"block_length": BLOCK, "ops": "reference", "steps": 20, **changes})


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
    least = factors("cosine", decay_to=0.1)
    assert least[11] == pytest.approx(0.55)
    assert least[19] == pytest.approx(0.1 + 0.9 * cosine[19])
    assert factors("linear", decay_to=0.5)[11] == pytest.approx(0.5 + 0.5 * 9 / 20)
    assert factors("constant", warmup_fraction=0.2)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
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
