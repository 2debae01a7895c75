"""The training loop: one optimizer step (`Trainer.step`) and a whole run (`fit`)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from tqdm import tqdm

import dmax_kernels
import dmax_kernels.reference
from dmax_kernels.files import one_writer
from dmax_kernels.training.baselines import Certainty, Mdlm, Uniform
from dmax_kernels.training.config import TrainConfig, check_same_run
from dmax_kernels.training.corrupt import CorruptedBatch, TrainBatch
from dmax_kernels.training.data import Example, Stream, collate
from dmax_kernels.training.model import decoder_layers
from dmax_kernels.training.optim import (
    MasterWeights,
    OwnWeights,
    build_optimizers,
    learning_rate_factor,
)
from dmax_kernels.training.oput import Objective, Oput, Recipe
from dmax_kernels.training.outputs import (
    Checkpoints,
    Metrics,
    load_state,
    losses_of,
    peak_memory,
    read_run,
    training_state,
)
from dmax_kernels.training.parallel import Processes, shard, whole_weights
from dmax_kernels.training.prepare import build_net

OBJECTIVES = {"oput": Oput, "uniform": Uniform, "mdlm": Mdlm, "certainty": Certainty}
OPS = {"fused": dmax_kernels, "reference": dmax_kernels.reference}


def build_objective(model: Any, config: TrainConfig, device: torch.device) -> Objective:
    """The loss of `config.objective`, with the model that it is computed from."""
    recipe = Recipe(**{item.name: getattr(config, item.name) for item in fields(Recipe)})
    return OBJECTIVES[config.objective](build_net(model, config, device), OPS[config.ops], recipe)


@dataclass
class Trainer:
    """A model with its loss and its optimizers, on one of several processes."""

    config: TrainConfig
    objective: Objective
    weights: OwnWeights | MasterWeights
    optimizers: list[Optimizer]
    peak_rates: list[float]
    eos_token_id: int
    group: Processes

    @classmethod
    def build(cls, model: Any, config: TrainConfig, eos_token_id: int, group: Processes) -> Trainer:
        """`config.steps` must be set, and the model's config must have a mask token."""
        if group.count > 1 and config.optimizer == "muon":
            raise ValueError(
                "optimizer must be adamw with several processes (Muon needs whole matrices), "
                "got muon"
            )
        objective = build_objective(model, config, group.device)
        if group.count > 1:
            shard(objective, config, group)
        masters = config.precision == "bf16-master" and group.count == 1
        weights = MasterWeights(model) if masters else OwnWeights(model)
        in_layers = {id(p) for p in decoder_layers(model).parameters()}
        layer_names = {name for name, p in model.named_parameters() if id(p) in in_layers}
        optimizers = build_optimizers(config, weights.named, layer_names)
        peak_rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
        return cls(config, objective, weights, optimizers, peak_rates, eos_token_id, group)

    def step(self, step: int, examples: list[Example]) -> dict[str, Any]:
        """One optimizer step on these examples, which are those of all processes.

        Returns:
            the step's row of metrics. If a loss or the gradient is not finite, the weights are left
            as they were.
        """
        config = self.config
        # Some models have dropout. Its draws, too, follow from the step's number alone.
        torch.manual_seed(config.seed * 1_000_003 + step + self.group.rank * 7_919)
        batch = collate(examples, config.block_length, self.eos_token_id, config.eos_tail)
        corrupted = self.objective.corrupt(batch, config.seed, step)
        losses = self.backward(corrupted)
        row = {
            "step": step,
            **losses,
            "grad_norm": self.clip(),
            "learning_rate": self.set_rates(step),
            "tokens": sum(example.num_tokens for example in examples),
        }
        if not not_finite(row):
            for optimizer in self.optimizers:
                optimizer.step()
            self.weights.publish()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        return row

    def backward(self, corrupted: CorruptedBatch) -> dict[str, float | None]:
        """Adds up gradients over this process's micro batches; the mean losses of all processes.

        A loss whose pass does not run in this step is None.
        """
        group, batch, names = self.group, corrupted.batch, self.objective.loss_names
        divisor = max(corrupted.divisor, 1.0)
        size = group.share(len(batch.tokens), self.config.micro_batch_size)
        sums: dict[str, Any] = {}
        for rows in micro_batches(batch, size)[group.rank :: group.count]:
            losses = self.objective(corrupted.rows(rows, group.device))
            (losses.total / divisor * group.count).backward()  # FSDP averages over the processes
            self.weights.take_gradients()
            for name, loss in losses.parts.items():
                sums[name] = sums.get(name, 0.0) + loss
        summed = group.sum([float(sums.get(name, 0.0)) for name in names])
        return {
            name: value / divisor if name in sums else None
            for name, value in zip(names, summed, strict=True)
        }

    def clip(self) -> float:
        """Clips the gradient and returns the norm that it had."""
        limit = self.config.clip_norm or math.inf
        parameters = [p for p in self.weights.named.values() if p.grad is not None]
        norm = (
            nn.utils.clip_grad_norm_(parameters, limit)
            if limit < math.inf
            else nn.utils.get_total_norm([p.grad for p in parameters])
        )
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    def set_rates(self, step: int) -> float:
        """Sets the learning rates of `step` and returns AdamW's."""
        factor = learning_rate_factor(self.config, step)
        for optimizer, peak in zip(self.optimizers, self.peak_rates, strict=True):
            for parameters in optimizer.param_groups:
                parameters["lr"] = peak * factor
        return self.peak_rates[-1] * factor

    def state(self) -> dict[str, torch.Tensor]:
        return training_state(self.weights.named, self.optimizers)

    def export(self) -> dict[str, torch.Tensor]:
        """The whole state dict on the first process, empty on the others; all must call it."""
        half = self.config.precision == "bf16-master"
        dtype = torch.bfloat16 if half else torch.float32
        return whole_weights(self.objective.net.model, dtype, keep=self.group.is_first)


def micro_batches(batch: TrainBatch, size: int) -> list[list[int]]:
    """The batch's rows in groups of similar length, which saves padding."""
    lengths = batch.editable.int().argmax(1) + batch.editable.sum(1)
    order = lengths.argsort(stable=True).tolist()
    return [order[i : i + size] for i in range(0, len(order), size)]


def fit(
    model: Any,
    config: TrainConfig,
    stream: Stream,
    output: Path,
    *,
    data: str,
    begun_with: dict[str, Any] | None = None,
    eos_token_id: int,
    save_model: Callable[[Any, dict[str, torch.Tensor], Path], None],
    group: Processes,
    stop_after: int | None = None,
    title: str = "train",
    draw: bool = True,
) -> list[dict[str, Any]]:
    """Trains `model` in place and returns the metrics of every step, including resumed ones.

    Writes OUTPUT/checkpoints, metrics.jsonl and, with `draw`, loss.png, and continues a run that it
    finds there.

    Args:
        stream: called with a step's number, it gives the examples of that step and the later ones.
        data: identifies the data; a run is not resumed on other data.
        begun_with: what else a run is not resumed without, by name, as JSON values.
        save_model: writes a Hugging Face folder from (model, state dict).
        stop_after: stop after this many steps in all, with a checkpoint.

    Raises:
        ValueError: the run in OUTPUT was begun with other settings or data, or is still going on.
        RuntimeError: a loss or the gradient is not finite.
        CheckpointNotWritten: the last good checkpoint is still there.
    """
    checkpoints = Checkpoints(output / "checkpoints", config.keep, group)
    settings = {**config.as_dict(), "data": data, **(begun_with or {})}
    resumed, first_step, seconds_before = checkpoints.newest(), 0, 0.0
    if resumed is not None:
        run = read_run(resumed)
        check_same_run(run["settings"], settings, resumed)
        first_step, seconds_before = run["step"], run["seconds"]
    group.share(config.batch_size, config.micro_batch_size)  # refuses sizes before the model moves
    trainer = Trainer.build(model, config, eos_token_id, group)
    if resumed is not None:
        load_state(resumed, trainer.state())
        trainer.weights.publish()
    end_step = min(config.steps, stop_after or config.steps)
    started = time.perf_counter()

    def save(steps_done: int) -> None:
        seconds = seconds_before + time.perf_counter() - started
        weights = trainer.export()
        checkpoints.save(
            steps_done,
            trainer.state(),
            {"step": steps_done, "settings": settings, "seconds": seconds},
            lambda path: save_model(model, weights, path) if group.is_first else None,
        )
        if metrics is not None and draw:
            metrics.draw()

    output.mkdir(parents=True, exist_ok=True)
    with (
        one_writer(output) if group.is_first else nullcontext(),
        tqdm(
            total=config.steps,
            initial=first_step,
            desc=title,
            unit="step",
            disable=not group.is_first,
        ) as bar,
    ):
        metrics = Metrics(output, first_step) if group.is_first else None
        batches = stream(first_step)
        for step in range(first_step, end_step):
            step_started = time.perf_counter()
            examples = next(batches)
            row = trainer.step(step, examples)
            row["seconds"] = time.perf_counter() - step_started
            row["peak_memory"] = peak_memory(group.device)
            if metrics is not None:
                metrics.add(row)
            check_finite(row, examples, checkpoints.newest())
            show(bar, row)
            if (step + 1) % config.save_every == 0 or step + 1 == end_step:
                save(step + 1)
    return metrics.rows if metrics is not None else []


def not_finite(row: dict[str, Any]) -> list[str]:
    """The names of losses and gradient norms that are not finite."""
    names = (*losses_of(row), "grad_norm")
    return [name for name in names if not math.isfinite(row[name])]


def check_finite(row: dict[str, Any], examples: list[Example], newest: Path | None) -> None:
    names = not_finite(row)
    if names:
        raise RuntimeError(
            f"{names[0]} is {row[names[0]]} at step {row['step']}, which was not applied; its "
            f"records: {', '.join(example.name for example in examples)}; the last good "
            f"checkpoint is {newest or 'not there yet'}"
        )


def show(bar: tqdm, row: dict[str, Any]) -> None:
    values = {name.removeprefix("loss_"): f"{row[name]:.3f}" for name in losses_of(row)}
    values["tokens/s"] = f"{row['tokens'] / row['seconds']:.0f}"
    values["GB"] = f"{row['peak_memory'] / 1e9:.2f}"
    bar.set_postfix(values, refresh=False)
    bar.update()
