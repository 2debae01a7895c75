"""The whole recipe, from nothing to three checkpoints.

base_block16 -> base -> distillation -> oput
                                     -> control

Every stage is a training run in OUTPUT/stages/NAME; the same call continues what it finds there.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from dmax_kernels.files import save_json
from dmax_kernels.ring_walk import task
from dmax_kernels.ring_walk.data import stage_stream
from dmax_kernels.ring_walk.distill import distill, distilled_examples
from dmax_kernels.ring_walk.evaluate import Cell, Result, evaluate_cell
from dmax_kernels.ring_walk.export import build_model, save_checkpoint, write_checkpoint
from dmax_kernels.ring_walk.stages import (
    BASE,
    BASE_BLOCK16,
    CONTROL,
    DISTILLATION,
    OPUT,
    Stage,
    WalkStage,
)
from dmax_kernels.training.data import Example
from dmax_kernels.training.distill import Counts
from dmax_kernels.training.loop import fit
from dmax_kernels.training.outputs import losses_of
from dmax_kernels.training.parallel import Processes

EVALUATION_PROBLEMS = 300
EVALUATION_SEED = 0
# The (rule, tau_dec) with which each model is evaluated on the held-out problems
EVALUATIONS = {
    "base": (("threshold", 0.95), ("threshold", 0.5), ("threshold", 0.0), ("spd", 0.5)),
    "oput": (("spd", 0.95), ("spd", 0.5), ("spd", 0.0), ("threshold", 0.5)),
    "control": (("threshold", 0.95), ("threshold", 0.5), ("threshold", 0.0), ("spd", 0.5)),
}
LOGGED = ("problems", "answer", "strict", "tokens_per_forward")
LOSS_WINDOW = 50


def run_recipe(output: Path, *, ops: str = "reference", command: str = "") -> dict[str, Any]:
    """Writes OUTPUT/{base,oput,control} and OUTPUT/training_log.json; returns the log."""
    stages_dir = output / "stages"
    stages_dir.mkdir(parents=True, exist_ok=True)  # fails now if the folder cannot be written
    log: dict[str, Any] = {
        "command": command,
        "ops": ops,
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "cpu": {"machine": platform.machine(), "simd": torch.backends.cpu.get_cpu_capability()},
        "stages": {},
        "distillation": {},
        "evaluation": {},
    }
    models: dict[str, nn.Module] = {}

    def run(stage: WalkStage, examples: list[Example] | None = None) -> None:
        start_from = models[stage.start_from].state_dict() if stage.start_from else None
        model = new_model(stage, start_from)
        metrics = run_stage(stage, model, examples, stages_dir / stage.name, ops=ops)
        models[stage.name] = model.eval()
        log["stages"][stage.name] = stage_log(stage, metrics)
        if stage.name in EVALUATIONS:
            log["evaluation"][stage.name] = evaluations(stage.name, model, ops)
            save_checkpoint(model, output / stage.name)
        save_json(output / "training_log.json", log)

    run(BASE_BLOCK16)
    run(BASE)
    answers = distill(DISTILLATION, models["base"], stages_dir / "distillation", ops=ops)
    examples = distilled_examples(DISTILLATION, answers, BASE.config.block_length)
    counts = Counts().add(answers)
    log["distillation"] = {
        **asdict(DISTILLATION),
        "kept": len(examples),
        "tokens": sum(len(example.response) for example in examples),
        "forwards": counts.forwards,
        "seconds": round(counts.seconds, 1),
    }
    run(OPUT, examples)
    run(CONTROL, examples)
    return log


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def new_model(
    stage: Stage,
    start_from: Mapping[str, torch.Tensor] | None,
    build: Callable[[int], nn.Module] = build_model,
) -> nn.Module:
    """build(the stage's block length), with new weights or a copy of those to start from."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stage.config.seed)
        model = build(stage.config.block_length)
    if start_from is not None:
        model.load_state_dict(start_from)
    return model


def run_stage(
    stage: WalkStage,
    model: nn.Module,
    examples: list[Example] | None,
    output: Path,
    *,
    ops: str,
    stop_after: int | None = None,
    device: torch.device | None = None,
    save_every: int | None = None,
    draw: bool = True,
) -> list[dict[str, Any]]:
    """Runs the training loop in one process, by default on the CPU."""
    return fit(
        model,
        replace(stage.config, ops=ops, save_every=save_every or stage.config.save_every),
        stage_stream(stage, examples),
        output,
        data=f"{stage.data} of {stage.num_moves} moves after {stage.start_from}",
        eos_token_id=task.EOS_ID,
        save_model=lambda model, weights, path: write_checkpoint(model, path, weights),
        group=Processes(0, 1, device or torch.device("cpu")),
        stop_after=stop_after,
        title=stage.name,
        draw=draw,
    )


def evaluations(name: str, model: nn.Module, ops: str) -> list[dict[str, Any]]:
    problems = task.evaluation_problems(EVALUATION_PROBLEMS, seed=EVALUATION_SEED)
    rows = []
    for rule, tau_dec in EVALUATIONS[name]:
        result = Result.of(evaluate_cell(model, problems, Cell(name, rule, tau_dec), ops))
        figures = {field: getattr(result, field) for field in LOGGED}
        rows.append({"rule": rule, "tau_dec": tau_dec, **figures})
        print(
            f"{name:8} {rule:9} tau {tau_dec:<4}  answer {result.answer:6.1%}  "
            f"strict {result.strict:6.1%}  tokens per forward {result.tokens_per_forward:.2f}",
            flush=True,
        )
    return rows


def stage_log(stage: Stage, metrics: list[dict[str, Any]]) -> dict[str, Any]:
    losses = [sum(row[name] for name in losses_of(row)) for row in metrics]
    means = [
        round(sum(window) / len(window), 4)
        for window in (losses[i : i + LOSS_WINDOW] for i in range(0, len(losses), LOSS_WINDOW))
    ]
    return {
        **stage.as_dict(),
        "seconds": round(sum(row["seconds"] for row in metrics), 1),
        "final_loss": means[-1],
        f"loss_means_of_{LOSS_WINDOW}_steps": means,
    }
