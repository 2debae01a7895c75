"""Learning rates over a run."""

from __future__ import annotations

import math

from dmax_kernels.training.config import TrainConfig


def learning_rate_factor(config: TrainConfig, step: int) -> float:
    """Factor on the peak rates at `step`, counted from 0; `config.steps` must be set.

    With W warm-up steps and S in all: min(1, (step + 1) / W) while it rises. Then, by the schedule,
    (1 + cos(pi (step - W) / (S - W))) / 2, or (S - step) / (S - decay_from S) but at most 1, or 1.
    """
    steps, warmup = config.steps, config.warmup_steps
    rising = min(1.0, (step + 1) / warmup) if warmup else 1.0
    if config.schedule == "linear":
        falling = steps * (1 - config.decay_from)
        return min(rising, (steps - step) / falling) if falling else rising
    if config.schedule == "cosine" and step >= warmup:
        return (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2
    return rising
