"""Decodes ring walks and grades them: for the recipe's log, and for the cells of `demo`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from typing import Any

import torch

from dmax_kernels.decoding import GenerationOutput
from dmax_kernels.evaluation import cells as measured
from dmax_kernels.evaluation.cells import Cell, Outcome, run_cell
from dmax_kernels.models.checkpoint import SHIPPED
from dmax_kernels.models.workers import Models, run_tasks, with_models
from dmax_kernels.ring_walk import task
from dmax_kernels.ring_walk.export import build_tokenizer

FIRST_PROBLEMS = measured.FIRST_PROBLEMS
MODELS = SHIPPED
TAUS = (0.95, 0.5, 0.0)
# More thresholds for the control, to find what self-distillation alone reaches at its best
CONTROL_TAUS = (0.9, 0.85, 0.8, 0.7)
MAX_NEW_TOKENS = 96  # three blocks of 32: the longest right derivation of 6 moves has 73 tokens


@dataclass(frozen=True)
class Result:
    """Means over `problems` problems; the first two are shares in [0, 1].

    arness: Global-ARness@1 of the tokens up to the end of sequence, if the cell asks for it.
    """

    answer: float
    strict: float
    tokens_per_forward: float
    forwards_per_block: float
    problems: int
    collapsed: bool
    arness: float | None = None

    @classmethod
    def of(cls, outcome: Outcome) -> Result:
        scores = outcome.arness
        return cls(
            answer=outcome.share("answer"),
            strict=outcome.share("strict"),
            tokens_per_forward=outcome.tokens_per_forward(),
            forwards_per_block=outcome.forwards_per_block,
            problems=outcome.problems,
            collapsed=outcome.collapsed,
            arness=sum(scores) / len(scores) if scores else None,
        )


def ablation_rows() -> Iterator[tuple[str, str]]:
    """(model, rule) of the paper's Table 3, and the control's rows beside it."""
    for model in MODELS:
        for rule in ("threshold", "hard", "hard_prefix", "hybrid", "spd"):
            # The prefix without hybrid embeddings is of interest for the trained model alone
            if rule != "hard_prefix" or model == "oput":
                yield model, rule


def all_cells() -> list[Cell]:
    cells = [Cell(model, rule, tau) for model, rule in ablation_rows() for tau in TAUS]
    cells += [Cell("oput", "spd", 0.5, criterion) for criterion in ("consistency", "confidence")]
    return cells + [Cell("control", "threshold", tau) for tau in CONTROL_TAUS]


def encode_prompts(problems: list[task.Problem], block_length: int) -> torch.Tensor:
    """Prompts [B, T]; problems of one number of moves have prompts of one length."""
    return torch.tensor([task.encode_prompt(problem, block_length) for problem in problems])


def measured_problems(problems: list[task.Problem], block_length: int) -> list[measured.Problem]:
    return [
        measured.Problem(task.encode_prompt(each, block_length), task.record_of(each))
        for each in problems
    ]


def options_for(model: Any, ops: str) -> dict[str, Any]:
    """The options of `spd_generate` that are the same in all cells."""
    return {
        "block_length": model.config.block_length,
        "max_new_tokens": MAX_NEW_TOKENS,
        "eos_token_id": (task.EOS_ID,),
        "ops": ops,
    }


def decode(
    model: Any, problems: list[task.Problem], cell: Cell, ops: str, trace: bool = False
) -> GenerationOutput:
    options = options_for(model, ops)
    encoded = measured_problems(problems, options["block_length"])
    return measured.decode(model, encoded, replace(cell, trace=trace), options)


def response_words(output: GenerationOutput) -> list[list[str]]:
    """Each row's decoded words, up to and including its first eos."""
    return [task.decode(answer) for answer in output.answers]


def evaluate_cell(model: Any, problems: list[task.Problem], cell: Cell, ops: str) -> Result:
    """The cell's figures, as `evaluate` has them (see `run_cell`)."""
    options = options_for(model, ops)
    encoded = measured_problems(problems, options["block_length"])
    return Result.of(run_cell(model, _tokenizer(), encoded, cell, task.grade_response, options))


def evaluate_cells(
    cells: list[Cell],
    checkpoints: dict[str, Any],
    problems: list[task.Problem],
    ops: str,
    workers: int,
) -> Iterator[tuple[Cell, Result]]:
    """Results as they come, from `workers` processes of one thread each.

    The tensors are too small to share among threads: on two busy cores, a second thread made a cell
    ten times slower.
    """
    names = {label: str(checkpoint) for label, checkpoint in checkpoints.items()}
    setup = with_models(partial(_evaluate, problems, ops), names)
    return run_tasks(setup, cells, workers=workers)


def _evaluate(problems: list[task.Problem], ops: str, models: Models, cell: Cell) -> Result:
    return evaluate_cell(models.get(cell.model).model, problems, cell, ops)


_tokenizer = cache(build_tokenizer)


def as_json(results: dict[Cell, Result]) -> list[dict[str, Any]]:
    return [{**asdict(cell), **asdict(result)} for cell, result in results.items()]
