"""Self-distillation: the base model writes the responses that OPUT and control learn from."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from torch import nn

from dmax_kernels.ring_walk import task
from dmax_kernels.ring_walk.evaluate import options_for
from dmax_kernels.ring_walk.stages import Distillation
from dmax_kernels.training import distill as log
from dmax_kernels.training.data import Example


def distill(
    settings: Distillation, model: nn.Module, folder: Path, *, ops: str = "reference"
) -> list[log.Answer]:
    """Answers training problems by confidence-threshold decoding; see `training.distill`.

    An answer's `response` holds the token ids up to and including `<eos>`.
    """
    problems = draw_problems(settings)
    options = {
        **options_for(model, ops), "rule": "threshold", "tau_dec": settings.threshold
    }  # fmt: skip
    model.eval()

    def answer_batches(batches: list[list[int]]) -> Iterator[list[log.Answer]]:
        for indexes in batches:
            prompts = [task.encode_prompt(problems[i], options["block_length"]) for i in indexes]
            yield log.decode_batch(model, prompts, indexes, options)

    answers = log.AnswerLog(folder, asdict(settings))
    log.distill(answers, len(problems), settings.batch_size, answer_batches)
    return list(answers.answers())


def draw_problems(settings: Distillation) -> list[task.Problem]:
    """Distinct problems from the training side of the split."""
    rng = random.Random(f"ring walk distillation {settings.seed}")
    problems: dict[tuple, task.Problem] = {}
    while len(problems) < settings.problems:
        problem = task.draw_problem(rng, settings.num_moves)
        problems.setdefault((problem.start, problem.moves), problem)
    return list(problems.values())


def distilled_examples(
    settings: Distillation, answers: list[log.Answer], block_length: int
) -> list[Example]:
    """Training examples from the complete responses."""
    problems = draw_problems(settings)
    examples = [
        Example(
            tuple(task.encode_prompt(problems[answer.index], block_length)),
            tuple(answer.response),
        )
        for answer in answers
        if answer.complete
    ]
    if not examples:
        raise ValueError(
            "distill: the base model must complete at least one response, got none in "
            f"{len(problems)} problems"
        )
    return examples
