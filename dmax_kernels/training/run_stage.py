"""One stage: batches -> loss -> optimizers, with a state file from which it resumes bit for bit."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dmax_kernels.training.data import Batch
from dmax_kernels.training.mdlm import mdlm_loss
from dmax_kernels.training.optim import build_optimizers
from dmax_kernels.training.oput import oput_step_loss
from dmax_kernels.training.stages import Stage
from dmax_kernels.training.state import load_state, save_state

SAVE_EVERY = 50


def run_stage(
    stage: Stage,
    model: nn.Module,
    batches: Iterator[Batch],
    state_path: Path,
    *,
    ops: str = "reference",
    stop_after: int | None = None,
) -> dict[str, Any]:
    """Trains `model` in place and returns the stage's state (step, losses, seconds, weights).

    What step i sees depends on the seed and on i alone, and the state holds the weights and both
    optimizers: a run resumed from it gives the losses of an uninterrupted one.

    Args:
        batches: the stage's stream from its beginning; a resumed run skips what it has seen.
        stop_after: leave off after so many steps in all, with the state saved.
    """
    optimizers = build_optimizers(model, stage.muon_lr, stage.adamw_lr)
    peak = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    losses: list[float] = []
    seconds_before = 0.0
    saved = load_state(state_path)
    if saved is not None:
        check_same_stage(saved["stage"], stage, state_path)
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        losses, seconds_before = saved["losses"], saved["seconds"]
    first, last = len(losses), min(stage.steps, stop_after or stage.steps)
    if first >= last:
        return saved
    model.train()
    started = time.perf_counter()
    for _ in range(first):
        next(batches)
    state = saved
    with tqdm(total=stage.steps, initial=first, desc=stage.name, unit="step") as progress:
        for step in range(first, last):
            for optimizer, rates in zip(optimizers, peak, strict=True):
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * stage.learning_rate_factor(step)
            loss = stage_loss(stage, model, next(batches), step, ops)
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
            progress.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
            progress.update()
            if (step + 1) % SAVE_EVERY == 0 or step + 1 == last:
                state = {
                    "stage": plain(stage),
                    "model": model.state_dict(),
                    "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                    "losses": losses,
                    "seconds": seconds_before + time.perf_counter() - started,
                    "ops": ops,
                }
                save_state(state_path, state)
    return state


def stage_loss(stage: Stage, model: nn.Module, batch: Batch, step: int, ops: str) -> Tensor:
    generator = torch.Generator().manual_seed(stage.seed * 1_000_003 + step)
    if stage.objective == "mdlm":
        return mdlm_loss(model, batch, generator, ops=ops)
    return oput_step_loss(
        model,
        batch,
        generator,
        ops=ops,
        mask_ratio=stage.mask_ratio,
        temperature=stage.rollout_temperature,
    )


def plain(stage: Any) -> dict[str, Any]:
    """A stage's numbers as lists and scalars, as they come back from a file."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(stage).items()}


def check_same_stage(saved: dict[str, Any], stage: Any, path: Path) -> None:
    """Refuses to resume a stage under other numbers than it was begun with."""
    wanted = plain(stage)
    different = [name for name in wanted if saved.get(name) != wanted[name]]
    if different:
        name = different[0]
        raise ValueError(
            f"run_stage: {path} must be of a stage with {name} = {wanted[name]}, "
            f"got {saved.get(name)}; train into another folder or delete that file"
        )
