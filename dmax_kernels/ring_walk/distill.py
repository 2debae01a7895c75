"""Self-distillation: the base model writes the responses that OPUT and control learn from."""

from __future__ import annotations

import random
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from dmax_kernels.files import write_atomically
from dmax_kernels.ring_walk import task
from dmax_kernels.ring_walk.evaluate import Cell, decode
from dmax_kernels.ring_walk.stages import Distillation
from dmax_kernels.training.config import check_same_run
from dmax_kernels.training.data import Example


def distill(
    settings: Distillation, model: nn.Module, state_path: Path, *, ops: str = "reference"
) -> dict[str, Any]:
    """Answers training problems by confidence-threshold decoding and keeps complete responses.

    Saves its state after every `batch_size` problems, so that it can be resumed. The state's
    `responses` holds the token ids up to `<eos>` for each problem in order, or an empty list for a
    response without an `<eos>`.
    """
    problems = draw_problems(settings)
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        check_same_run(state["settings"], asdict(settings), state_path)
    else:
        state = {"settings": asdict(settings), "responses": [], "seconds": 0.0, "forwards": 0}
    responses = state["responses"]
    cell = Cell("base", "threshold", settings.threshold)
    model.eval()
    first = len(responses)
    with tqdm(total=len(problems), initial=first, desc="distillation", unit="problem") as progress:
        for begin in range(first, len(problems), settings.batch_size):
            started = time.perf_counter()
            chunk = problems[begin : begin + settings.batch_size]
            output = decode(model, chunk, cell, ops)
            responses += [ids if ids[-1] == task.EOS_ID else [] for ids in output.answers]
            state["forwards"] += int(output.num_forwards.sum())
            state["seconds"] += time.perf_counter() - started
            write_atomically(state_path, lambda file: torch.save(state, file))
            progress.update(len(chunk))
    return state


def draw_problems(settings: Distillation) -> list[task.Problem]:
    """Distinct problems from the training side of the split."""
    rng = random.Random(f"ring walk distillation {settings.seed}")
    problems: dict[tuple, task.Problem] = {}
    while len(problems) < settings.problems:
        problem = task.draw_problem(rng, settings.num_moves)
        problems.setdefault((problem.start, problem.moves), problem)
    return list(problems.values())


def distilled_examples(
    settings: Distillation, responses: list[list[int]], block_length: int
) -> list[Example]:
    """Training examples from the complete responses."""
    problems = draw_problems(settings)
    examples = [
        Example(tuple(task.encode_prompt(problem, block_length)), tuple(response))
        for problem, response in zip(problems, responses, strict=True)
        if response
    ]
    if not examples:
        raise ValueError(
            "distill: the base model must complete at least one response, got none in "
            f"{len(problems)} problems"
        )
    return examples
