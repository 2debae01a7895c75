"""The whole training, from nothing to three checkpoints.

base_block16 -> base -> distillation -> oput
                                     -> control

Every finished step leaves a file in OUTPUT/state; the same call goes on from what it finds there.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from dmax_kernels.models import ring_walk
from dmax_kernels.models.checkpoint import build_model, save_checkpoint
from dmax_kernels.training.data import (
    Batch,
    Example,
    batches,
    repeated_examples,
    ring_walk_examples,
)
from dmax_kernels.training.distill import distill, distilled_examples
from dmax_kernels.training.evaluate import evaluate
from dmax_kernels.training.run_stage import plain, run_stage
from dmax_kernels.training.stages import (
    BASE,
    BASE_BLOCK16,
    CONTROL,
    DISTILLATION,
    OPUT,
    Stage,
)
from dmax_kernels.training.state import save_json

EVALUATION_PROBLEMS = 300
EVALUATION_SEED = 0
# (rule, tau_dec) on the held-out problems, per model.
EVALUATIONS = {
    "base": (("threshold", 0.95), ("threshold", 0.5), ("threshold", 0.0), ("spd", 0.5)),
    "oput": (("spd", 0.95), ("spd", 0.5), ("spd", 0.0), ("threshold", 0.5)),
    "control": (("threshold", 0.95), ("threshold", 0.5), ("threshold", 0.0), ("spd", 0.5)),
}
LOSS_WINDOW = 50


def train(output: Path, *, ops: str = "reference", command: str = "") -> dict[str, Any]:
    """Writes OUTPUT/{base,oput,control} and OUTPUT/training_log.json; returns the log."""
    state_dir = output / "state"
    state_dir.mkdir(parents=True, exist_ok=True)  # a folder that cannot be written shows here
    log: dict[str, Any] = {
        "command": command,
        "ops": ops,
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "cpu": {"machine": platform.machine(), "simd": torch.backends.cpu.get_cpu_capability()},
        "stages": {},
        "distillation": {},
        "evaluation": {},
    }
    models: dict[str, nn.Module] = {}

    def run(stage: Stage, examples: list[Example] | None = None) -> None:
        start_from = models.get(stage.start_from) if stage.start_from else None
        model = new_model(stage, start_from)
        state = run_stage(
            stage, model, stage_batches(stage, examples), state_dir / f"{stage.name}.pt", ops=ops
        )
        models[stage.name] = model
        log["stages"][stage.name] = stage_log(stage, state)
        if stage.name in EVALUATIONS:
            log["evaluation"][stage.name] = evaluations(stage.name, model, ops)
            save_checkpoint(model, output / stage.name)
        save_json(output / "training_log.json", log)

    run(BASE_BLOCK16)
    run(BASE)
    distilled = distill(DISTILLATION, models["base"], state_dir / "distillation.pt", ops=ops)
    examples = distilled_examples(DISTILLATION, distilled["responses"], BASE.block_length)
    log["distillation"] = {
        **plain(DISTILLATION),
        "kept": len(examples),
        "tokens": sum(len(example.response) for example in examples),
        "forwards": distilled["forwards"],
        "seconds": round(distilled["seconds"], 1),
    }
    run(OPUT, examples)
    run(CONTROL, examples)
    return log


def new_model(stage: Stage, start_from: nn.Module | None) -> nn.Module:
    """A model of the stage's block length, with new weights or with a copy of another's."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stage.seed)
        model = build_model(stage.block_length)
    if start_from is not None:
        model.load_state_dict(start_from.state_dict())
    return model


def stage_batches(stage: Stage, examples: list[Example] | None) -> Iterator[Batch]:
    """The stage's stream of batches from its beginning."""
    if stage.data == "distilled":
        stream = repeated_examples(examples, stage.seed)
    else:
        stream = ring_walk_examples(stage.num_moves, stage.block_length, stage.seed)
    return batches(stream, stage.block_length, stage.batch_size)


def evaluations(name: str, model: nn.Module, ops: str) -> list[dict[str, Any]]:
    model.eval()
    problems = ring_walk.evaluation_problems(EVALUATION_PROBLEMS, seed=EVALUATION_SEED)
    rows = []
    for rule, tau_dec in EVALUATIONS[name]:
        row = evaluate(model, problems, rule=rule, tau_dec=tau_dec, ops=ops)
        rows.append(row)
        print(
            f"{name:8} {rule:9} tau {tau_dec:<4}  answer {row['answer']:6.1%}  "
            f"strict {row['strict']:6.1%}  tokens per forward {row['tokens_per_forward']:.2f}",
            flush=True,
        )
    return rows


def stage_log(stage: Stage, state: dict[str, Any]) -> dict[str, Any]:
    losses = state["losses"]
    means = [
        round(sum(window) / len(window), 4)
        for window in (losses[i : i + LOSS_WINDOW] for i in range(0, len(losses), LOSS_WINDOW))
    ]
    return {
        **plain(stage),
        "seconds": round(state["seconds"], 1),
        "final_loss": means[-1],
        f"loss_means_of_{LOSS_WINDOW}_steps": means,
    }
