"""The training loop: one step, all steps, and what is left of them on disk."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from tqdm import tqdm

from dmax_kernels.training.config import TrainConfig, check_same_run
from dmax_kernels.training.data import Batch, Example, Stream, collate
from dmax_kernels.training.model import DenoisingModel, build_net, decoder_layers
from dmax_kernels.training.ops import select_ops
from dmax_kernels.training.optim import (
    MasterWeights,
    OwnWeights,
    build_optimizers,
    learning_rate_factor,
)
from dmax_kernels.training.outputs import (
    Checkpoints,
    Metrics,
    load_state,
    peak_memory,
    read_run,
    training_state,
)
from dmax_kernels.training.parallel import Processes, shard, whole_weights
from dmax_kernels.training.step import draw, micro_batch_losses


@dataclass
class Trainer:
    """A model with its optimizers, on one of several processes."""

    config: TrainConfig
    net: DenoisingModel
    weights: OwnWeights | MasterWeights
    optimizers: list[Optimizer]
    peak_rates: list[float]
    eos_token_id: int
    group: Processes

    @classmethod
    def build(cls, model: Any, config: TrainConfig, eos_token_id: int, group: Processes) -> Trainer:
        """`config.steps` must be set, and the model's config have a mask token."""
        if group.count > 1 and config.optimizer == "muon":
            raise ValueError(
                "optimizer must be adamw with several processes (Muon needs whole matrices), "
                "got muon"
            )
        net = build_net(model, config, group.device)
        if group.count > 1:
            shard(net, config, group)
        masters = config.precision == "bf16-master" and group.count == 1
        weights = MasterWeights(net) if masters else OwnWeights(net)
        inside = {id(p) for p in decoder_layers(net.model).parameters()}
        layers = {name for name, p in net.model.named_parameters() if id(p) in inside}
        optimizers = build_optimizers(config, weights.named, layers)
        peak_rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
        return cls(config, net, weights, optimizers, peak_rates, eos_token_id, group)

    def step(self, step: int, examples: list[Example]) -> dict[str, Any]:
        """One optimizer step on these examples, which are those of all processes.

        Returns:
            the step's row of metrics. With a loss or gradient that is not finite, the weights are
            left as they were.
        """
        config, group = self.config, self.group
        # Dropout, where a model has it: the step's number is all that a resumed run needs
        torch.manual_seed(config.seed * 1_000_003 + step + group.rank * 7_919)
        batch = collate(examples, config.block_length, self.eos_token_id, config.eos_tail)
        draws = draw(config, batch, step)
        count = max(draws.num_learnt, 1)
        size = group.share(len(examples), config.micro_batch_size)
        sums, ops = [0.0, 0.0], select_ops(config.ops)
        for index in micro_batches(batch, size)[group.rank :: group.count]:
            losses = micro_batch_losses(self.net, config, batch, draws, index, ops)
            total = sum(loss for loss in losses if loss is not None)
            (total / count * group.count).backward()  # FSDP averages over the processes
            self.weights.take_gradients()
            sums = [
                s + (0.0 if loss is None else loss.detach())
                for s, loss in zip(sums, losses, strict=True)
            ]
        means = [value / count for value in group.sum([float(value) for value in sums])]
        row = {
            "step": step,
            **{
                name: mean if runs else None
                for name, mean, runs in zip(
                    ("loss_masked", "loss_predicted"), means, draws.passes, strict=True
                )
            },
            "grad_norm": self.clip(),
            "learning_rate": self.set_rates(step),
            "tokens": batch.num_tokens,
        }
        if math.isfinite(sum(means)) and math.isfinite(row["grad_norm"]):
            for optimizer in self.optimizers:
                optimizer.step()
            self.weights.publish()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        return row

    def clip(self) -> float:
        limit = self.config.clip_norm or math.inf
        parameters = [p for p in self.weights.named.values() if p.grad is not None]
        norm = (
            nn.utils.clip_grad_norm_(parameters, limit)
            if limit < math.inf
            else (nn.utils.get_total_norm([p.grad for p in parameters]))
        )
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    def set_rates(self, step: int) -> float:
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
        return whole_weights(self.net.model, dtype, keep=self.group.is_first)


def micro_batches(batch: Batch, size: int) -> list[list[int]]:
    """Rows of similar length together, which saves padding."""
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
    eos_token_id: int,
    save_model: Callable[[Any, dict[str, torch.Tensor], Path], None],
    group: Processes,
    stop_after: int | None = None,
    title: str = "train",
) -> list[dict[str, Any]]:
    """Trains `model` in place and returns the metrics of every step, resumed ones included.

    OUTPUT/checkpoints, metrics.jsonl and loss.png are written; a run found there is gone on with.

    Args:
        stream: the examples of each step from a given one on.
        data: says which data they are; a run is not resumed on other data.
        save_model: writes a Hugging Face folder from (model, state dict).
        stop_after: leave off after so many steps in all, with a checkpoint.

    Raises:
        ValueError: the run found there is another one.
        RuntimeError: a loss or gradient that is not finite.
        CheckpointNotWritten: the last good checkpoint is still there.
    """
    checkpoints = Checkpoints(output / "checkpoints", config.keep, group)
    settings = {**config.as_dict(), "data": data}
    newest, first, seconds_before = checkpoints.newest(), 0, 0.0
    if newest is not None:
        run = read_run(newest)
        check_same_run(run["settings"], settings, newest)
        first, seconds_before = run["step"], run["seconds"]
    group.share(config.batch_size, config.micro_batch_size)
    trainer = Trainer.build(model, config, eos_token_id, group)
    if newest is not None:
        load_state(newest, trainer.state())
        trainer.weights.publish()
    metrics = Metrics(output, first) if group.is_first else None
    last = min(config.steps, stop_after or config.steps)
    started = time.perf_counter()
    bar = tqdm(
        total=config.steps, initial=first, desc=title, unit="step", disable=not group.is_first
    )
    with bar:
        batches = stream(first)
        for step in range(first, last):
            begun = time.perf_counter()
            examples = next(batches)
            row = trainer.step(step, examples)
            row["seconds"] = time.perf_counter() - begun
            row["peak_memory"] = peak_memory(group.device)
            if metrics is not None:
                metrics.add(row)
            check_finite(row, examples, checkpoints.newest())
            show(bar, row)
            if (step + 1) % config.save_every == 0 or step + 1 == last:
                seconds = seconds_before + time.perf_counter() - started
                weights = trainer.export()
                checkpoints.save(
                    step + 1,
                    trainer.state(),
                    {"step": step + 1, "settings": settings, "seconds": seconds},
                    lambda path, weights=weights: (
                        save_model(model, weights, path) if group.is_first else None
                    ),
                )
                if metrics is not None:
                    metrics.draw()
    return metrics.rows if metrics is not None else []


def check_finite(row: dict[str, Any], examples: list[Example], newest: Path | None) -> None:
    for name in ("loss_masked", "loss_predicted", "grad_norm"):
        value = row[name]
        if value is not None and not math.isfinite(value):
            raise RuntimeError(
                f"{name} is {value} at step {row['step']}, which was not applied; its records: "
                f"{', '.join(example.name for example in examples)}; the last good checkpoint is "
                f"{newest or 'not there yet'}"
            )


def show(bar: tqdm, row: dict[str, Any]) -> None:
    values = {
        name.removeprefix("loss_"): f"{row[name]:.3f}"
        for name in ("loss_masked", "loss_predicted")
        if row[name] is not None
    }
    values["tokens/s"] = f"{row['tokens'] / row['seconds']:.0f}"
    values["GB"] = f"{row['peak_memory'] / 1e9:.2f}"
    bar.set_postfix(values, refresh=False)
    bar.update()
