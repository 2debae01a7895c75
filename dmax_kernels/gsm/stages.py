"""The stages of the recipe, with every setting that they use.

base_block16 -> base -> distillation -> oput, control, uniform, certainty

The data of a stage is "train", the file's own chains of thought, or "distilled", the base model's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from dmax_kernels.ring_walk.stages import Stage, stage_config
from dmax_kernels.training.config import TrainConfig


def gsm_config(batch_size: int, **changes: Any) -> TrainConfig:
    """The ring walk's optimizer, schedule and greedy rollout, with larger batches."""
    return replace(stage_config(**changes), batch_size=batch_size, save_every=600, warmup_steps=50)


# The bases' rates are the ring walk's. As there, the first stage has blocks of half the length.
BASE_BLOCK16 = Stage(
    name="base_block16",
    start_from=None,
    data="train",
    config=gsm_config(
        batch_size=128,
        objective="mdlm",
        block_length=16,
        steps=900,
        muon_learning_rate=0.02,
        learning_rate=3e-3,
        decay_from=0.7,
        seed=1,
    ),
)
BASE = Stage(
    name="base",
    start_from="base_block16",
    data="train",
    config=gsm_config(
        batch_size=128,
        objective="mdlm",
        steps=1100,
        muon_learning_rate=0.02,
        learning_rate=2e-3,
        decay_from=0.3,
        seed=2,
    ),
)
# Half the ring walk's rates, and larger batches: at the ring walk's, 150 steps of 32 on 250 answers
# of each template lost 12 points of the base's accuracy even in plain masked training
ON_DISTILLED = {
    "batch_size": 128,
    "steps": 400,
    "muon_learning_rate": 0.005,
    "learning_rate": 5e-4,
    "seed": 4,
}
OBJECTIVES = {"oput": "oput", "control": "mdlm", "uniform": "uniform", "certainty": "certainty"}
ARMS = tuple(
    Stage(name, "base", "distilled", gsm_config(objective=objective, **ON_DISTILLED))
    for name, objective in OBJECTIVES.items()
)

GIVEN = "given"  # the name of a base model that was made elsewhere

# The (rule, tau_dec) with which each model is measured, the most wanted first
THRESHOLDS = tuple(("threshold", tau) for tau in (0.95, 0.8, 0.5, 0.0, 0.9))
CELLS = {
    "base": (*THRESHOLDS, ("hierarchical", 0.95), ("hierarchical", 0.8), ("spd", 0.5)),
    "oput": (
        *(("spd", tau) for tau in (0.5, 0.95, 0.0, 0.8, 0.2)),
        *(("threshold", 0.95), ("hard", 0.5), ("hard", 0.0), ("hybrid", 0.5), ("hybrid", 0.0)),
        *(("hard_prefix", 0.5), ("hard", 0.95), ("threshold", 0.8), ("threshold", 0.5)),
    ),
    "control": (*THRESHOLDS, ("spd", 0.5)),
    "uniform": (("uniform", 0.0), ("hard", 0.95), ("hard", 0.5), ("threshold", 0.95)),
    "certainty": (*THRESHOLDS, ("spd", 0.5)),
}
NEW_CELLS = {"base": (("threshold", 0.95),), "oput": (("spd", 0.5),)}


Cells = Mapping[str, tuple[tuple[str, float], ...]]


@dataclass(frozen=True)
class Recipe:
    """Everything that a run is made of, so that tests and trials can have a smaller one.

    Attributes:
        sizes: of the model, fields of `TinyDlmConfig`.
        cells: the rows measured on test problems of learnt templates, by model.
        new_cells: those on problems of templates that were held out whole.
        distill_threshold: the confidence threshold by which the base model answers.
        distill_problems: how many of the file's "distill" problems it answers; None for all.
        learnt: templates of which at least this share of these answers is right are the task from
            then on: all later training and all measured problems are of them alone. The measured
            problems take no part in the choice.
        least: how many templates are kept in any case, the best ones.
        measured: the most problems of a row.
    """

    sizes: Mapping[str, int] = field(
        default_factory=lambda: {
            "hidden_size": 256,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "intermediate_size": 1024,
        }
    )
    bases: tuple[Stage, ...] = (BASE_BLOCK16, BASE)
    arms: tuple[Stage, ...] = ARMS
    cells: Cells = field(default_factory=lambda: CELLS)
    new_cells: Cells = field(default_factory=lambda: NEW_CELLS)
    distill_threshold: float = 0.95
    distill_problems: int | None = None
    distill_batch: int = 960
    learnt: float = 0.8
    least: int = 6
    measured: int = 512
    measured_batch: int = 512

    @property
    def models(self) -> tuple[str, ...]:
        return ("base", *(stage.name for stage in self.arms))

    def small(self) -> Recipe:
        """For a CPU: a sixth of the parameters and half the batch, for few and easy templates."""

        def halved(stage: Stage, steps: int) -> Stage:
            config = replace(stage.config, batch_size=64, steps=steps, save_every=200)
            return replace(stage, config=config)

        return replace(
            self,
            sizes={
                "hidden_size": 128,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "intermediate_size": 512,
            },
            bases=(halved(BASE_BLOCK16, 500), halved(BASE, 1000)),
            arms=tuple(halved(stage, 300) for stage in ARMS),
            least=4,
            distill_batch=64,  # whose activations fit into a cache
            measured_batch=64,
        )

    def continued(self, steps: int) -> Recipe:
        """For a base model that is given: no stage before the arms, or so many steps more."""
        config = replace(self.bases[-1].config, steps=steps, seed=3) if steps else None
        more = () if config is None else (Stage("base", GIVEN, "train", config),)
        return replace(self, bases=more)

    def scaled(self, of_bases: float, of_arms: float) -> Recipe:
        """The same with so many times the training steps."""

        def scale(stages: tuple[Stage, ...], factor: float) -> tuple[Stage, ...]:
            steps = [max(1, round(stage.config.steps * factor)) for stage in stages]
            return tuple(
                replace(stage, config=replace(stage.config, steps=n))
                for stage, n in zip(stages, steps, strict=True)
            )

        return replace(self, bases=scale(self.bases, of_bases), arms=scale(self.arms, of_arms))
