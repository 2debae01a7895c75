"""The stages of the recipe, with every setting that they use."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from dmax_kernels.training.config import TrainConfig


@dataclass(frozen=True)
class Stage:
    """One training run: what it starts from, what it learns from, and its settings.

    Attributes:
        start_from: the stage whose weights this one starts from; None for new weights.
        data: a name that the recipe knows: "distilled" for the base model's own responses, repeated
            in epochs, or the task's own name for correct ones.
    """

    name: str
    start_from: str | None
    data: str
    config: TrainConfig

    def as_dict(self) -> dict[str, Any]:
        """All fields as JSON values, `config` last."""
        others = {name: value for name, value in asdict(self).items() if name != "config"}
        return {**others, "config": self.config.as_dict()}


@dataclass(frozen=True, kw_only=True)
class WalkStage(Stage):
    """A stage of the ring walk: "ring_walk" are derivations that are newly drawn for each batch."""

    num_moves: int


@dataclass(frozen=True)
class Distillation:
    """The base model answers training problems, and its complete responses become the data."""

    problems: int
    num_moves: int
    threshold: float
    batch_size: int
    seed: int


def stage_config(**changes: Any) -> TrainConfig:
    """What all stages share: greedy rollout, Muon, no clipping, a linear fall of the rate."""
    shared: dict[str, Any] = {
        "rollout_temperature": 0.0,
        "batch_size": 32,
        "optimizer": "muon",
        "schedule": "linear",
        "clip_norm": None,
        "save_every": 50,
        "keep": 1,
    }
    return TrainConfig(**{**shared, **changes})


# Learning rates, batch size, warm-up and the start at block length 16 come from an earlier trial of
# this task, in which training at block length 32 from scratch got 2 % of derivations right after 11
# minutes.
BASE_BLOCK16 = WalkStage(
    name="base_block16",
    start_from=None,
    data="ring_walk",
    num_moves=4,
    config=stage_config(
        objective="mdlm",
        block_length=16,
        steps=1800,
        muon_learning_rate=0.02,
        learning_rate=3e-3,
        decay_from=0.7,
        seed=1,
    ),
)
BASE = WalkStage(
    name="base",
    start_from="base_block16",
    data="ring_walk",
    num_moves=6,
    config=stage_config(
        objective="mdlm",
        steps=1000,
        muon_learning_rate=0.015,
        learning_rate=2e-3,
        decay_from=0.6,
        seed=2,
    ),
)
DISTILLATION = Distillation(problems=4608, num_moves=6, threshold=0.95, batch_size=256, seed=3)
# Mask ratio 0.75 is the paper's (section 4.1). The linear fall takes the place of its cosine.
ON_DISTILLED = {"steps": 600, "muon_learning_rate": 0.01, "learning_rate": 1e-3, "seed": 4}
OPUT = WalkStage(
    name="oput",
    start_from="base",
    data="distilled",
    num_moves=6,
    config=stage_config(objective="oput", **ON_DISTILLED),
)
# The control for OPUT: the same number of steps of plain masked training on the same responses
CONTROL = WalkStage(
    name="control",
    start_from="base",
    data="distilled",
    num_moves=6,
    config=stage_config(objective="mdlm", **ON_DISTILLED),
)
