"""The ladder: the paper's trainings at several lengths, from one base model and the same data.

An arm is one training: a method, a number of steps and a seed. All arms start from the base model,
learn from the same responses of its own, and share every setting but these three: each arm's
learning rate falls to 0 at its own last step, so that an arm of 200 steps is a whole training and
no snapshot of a longer one. The same call continues what it finds in its folder.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dmax_kernels.files import save_json
from dmax_kernels.models.checkpoint import load_checkpoint
from dmax_kernels.models.machine import device_name
from dmax_kernels.models.workers import run_tasks
from dmax_kernels.ring_walk.distill import distill, distilled_examples
from dmax_kernels.ring_walk.export import save_checkpoint
from dmax_kernels.ring_walk.recipe import new_model, run_stage, stage_log, versions
from dmax_kernels.ring_walk.stages import BASE, DISTILLATION, ON_DISTILLED, WalkStage, stage_config
from dmax_kernels.training.data import Example

# The objective of each method, and what differs from the settings that all methods share
METHODS: dict[str, dict[str, Any]] = {
    "oput": {"objective": "oput"},
    "control": {"objective": "mdlm"},
    "uniform": {"objective": "uniform"},
    "certainty": {"objective": "certainty"},
    "oput_drawn": {"objective": "oput", "rollout_temperature": 1.0},
}
RUNGS = (100, 200, 400, 600)
FIRST_SEED = ON_DISTILLED["seed"]
SEEDS = (FIRST_SEED, FIRST_SEED + 1, FIRST_SEED + 2)
SAVE_EVERY = 200  # steps between the states from which an interrupted arm goes on


@dataclass(frozen=True)
class Arm:
    method: str
    steps: int
    seed: int = FIRST_SEED

    @property
    def name(self) -> str:
        seed = "" if self.seed == FIRST_SEED else f"-seed{self.seed}"
        return f"{self.method}-{self.steps}{seed}"

    def stage(self) -> WalkStage:
        changes = {"steps": self.steps, "seed": self.seed, **METHODS[self.method]}
        config = stage_config(**{**ON_DISTILLED, **changes})
        return WalkStage(self.name, "base", "distilled", config, num_moves=BASE.num_moves)


def all_arms() -> list[Arm]:
    """Every arm, those first without which the tables could not be printed."""
    methods = [method for method in METHODS if method != "oput_drawn"]
    arms = [Arm(method, steps) for steps in (600, 200) for method in methods]
    arms += [Arm("oput", steps, seed) for steps in (600, 200) for seed in SEEDS[1:]]
    arms += [Arm(method, steps) for steps in (400, 100) for method in methods]
    arms += [Arm("oput_drawn", 200, seed) for seed in SEEDS] + [Arm("oput_drawn", 600)]
    others = methods[1:]
    arms += [
        Arm(method, steps, seed) for steps in (200, 600) for method in others for seed in SEEDS[1:]
    ]
    return arms


@dataclass(frozen=True)
class Training:
    """How arms are trained, in a form that other processes can receive."""

    output: Path
    examples: list[Example]
    device: str
    ops: str

    def __call__(self, arm: Arm) -> dict[str, Any]:
        """Trains the arm and writes OUTPUT/NAME and OUTPUT/logs/NAME.json; returns its log."""
        stage = arm.stage()
        base, _ = load_checkpoint("base")
        model = new_model(stage, base.state_dict())
        folder = self.output / "stages" / arm.name
        metrics = run_stage(
            stage,
            model,
            self.examples,
            folder,
            ops=self.ops,
            device=torch.device(self.device),
            save_every=SAVE_EVERY,
            draw=False,
        )
        log = {**stage_log(stage, metrics), "made_with": made_with(self.device), "ops": self.ops}
        save_rounded(model.cpu(), self.output / arm.name)
        save_json(self.output / "logs" / f"{arm.name}.json", log)
        shutil.rmtree(folder)  # its state is ten times as large as the model
        return log


def save_rounded(model: nn.Module, path: Path) -> None:
    """A checkpoint whose tensors are float16: half the bytes. Its config says float32, so that it
    is loaded and decoded as such."""
    weights = {name: value.half() for name, value in model.state_dict().items()}
    save_checkpoint(model, path, weights)


def made_with(device: str) -> dict[str, str]:
    return {"device": device_name(device), **versions()}


def train_ladder(
    output: Path,
    arms: list[Arm],
    *,
    device: str = "cpu",
    ops: str = "reference",
    workers: int = 1,
) -> Iterator[Arm]:
    """Trains those arms that OUTPUT lacks, and yields each when it is there.

    Args:
        device: "cpu", or "cuda" for one GPU that all workers share: a step of a model as small as
            this one is a matter of starting kernels.
    """
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device must be cpu where torch finds no GPU, got {device}")
    (output / "stages").mkdir(parents=True, exist_ok=True)
    done = [arm for arm in arms if is_trained(output, arm)]
    yield from done
    left = [arm for arm in arms if arm not in done]
    if not left:
        return
    training = Training(output, ladder_examples(output, ops), device, ops)
    for arm, _ in run_tasks(partial(_setup, training), left, workers=min(workers, len(left))):
        yield arm


def _setup(training: Training, number: int) -> Callable[[Arm], dict[str, Any]]:
    return training


def is_trained(output: Path, arm: Arm) -> bool:
    log = output / "logs" / f"{arm.name}.json"
    return log.is_file() and (output / arm.name / "config.json").is_file()


def ladder_examples(output: Path, ops: str) -> list[Example]:
    """The base model's responses: the data of all arms, written once into OUTPUT/distillation."""
    base, _ = load_checkpoint("base")
    answers = distill(DISTILLATION, base, output / "distillation", ops=ops)
    return distilled_examples(DISTILLATION, answers, BASE.config.block_length)
