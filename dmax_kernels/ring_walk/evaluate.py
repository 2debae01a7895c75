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
from dmax_kernels.models.workers import Models, run_tasks, with_models
from dmax_kernels.ring_walk import task
from dmax_kernels.ring_walk.export import build_tokenizer

FIRST_PROBLEMS = measured.FIRST_PROBLEMS
MODELS = ("base", "oput", "control")  # which `demo --rules` decodes
TAUS = (0.95, 0.5, 0.0)  # the paper's Table 3
POINTS = (0.95, 0.8, 0.5, 0.0)  # the thresholds over which a method's AUP is taken
MAX_NEW_TOKENS = 96  # three blocks of 32: the longest right derivation of 6 moves has 73 tokens
MEASURES = ("answer", "strict")
# Problems decoded together. On one core of a Zen 4 a cell of 500 took 0.80 to 0.87 of the time that
# it takes in one batch, whose activations do not fit into the cache.
BATCH = 100

# What each method's model is decoded with: rules and their thresholds, for the paper's tables and
# for what they leave out. "uniform" has no threshold. The AUP of SPD on the uniform model is there
# because it is the fairer reading of that training.
DECODINGS: dict[str, dict[str, tuple[float, ...]]] = {
    "base": {"threshold": POINTS, "hierarchical": POINTS, "spd": TAUS},
    "control": {"threshold": POINTS, "spd": TAUS},
    "certainty": {"threshold": POINTS},
    "uniform": {"uniform": (0.0,), "spd": POINTS},
    "oput": {
        "threshold": POINTS,
        "hard": TAUS,
        "hard_prefix": TAUS,
        "hybrid": TAUS,
        "spd": POINTS,
    },
}
METHODS = tuple(DECODINGS)
CRITERIA = ("consistency", "confidence", "both")  # the paper's Table 4


@dataclass(frozen=True)
class Result:
    """Means over `problems` problems; the first two are shares in [0, 1].

    tokens_per_forward: the mean of the problems' ratios; `_sum` is all tokens over all passes, and
        `_authors` the mean without the end-of-sequence token, as the paper's authors count.
    arness: Global-ARness@1 of the tokens up to the end of sequence, if the cell asks for it.
    """

    answer: float
    strict: float
    tokens_per_forward: float
    tokens_per_forward_sum: float
    tokens_per_forward_authors: float
    tokens_per_second: float
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
            tokens_per_forward_sum=outcome.tokens_per_forward("sum"),
            tokens_per_forward_authors=outcome.tokens_per_forward(count_eos=False),
            tokens_per_second=outcome.tokens_per_second,
            forwards_per_block=outcome.forwards_per_block,
            problems=outcome.problems,
            collapsed=outcome.collapsed,
            arness=sum(scores) / len(scores) if scores else None,
        )


def method_cells(method: str, label: str | None = None) -> list[Cell]:
    """The cells of a method, whose model has this label."""
    label = method if label is None else label
    cells = [Cell(label, rule, tau) for rule, taus in DECODINGS[method].items() for tau in taus]
    if method == "oput":
        cells += [Cell(label, "spd", 0.5, criterion) for criterion in CRITERIA[:2]]
    return cells


def all_cells() -> list[Cell]:
    return [cell for method in METHODS for cell in method_cells(method)]


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


def evaluate_cell(model: Any, problems: list[task.Problem], cell: Cell, ops: str) -> Outcome:
    """What happens to each problem, as `evaluate` has it (see `run_cell`)."""
    options = options_for(model, ops)
    encoded = measured_problems(problems, options["block_length"])
    return run_cell(
        *(model, _tokenizer(), encoded, cell, task.grade_response, options), batch_size=BATCH
    )


def evaluate_cells(
    cells: list[Cell],
    checkpoints: dict[str, Any],
    problems: list[task.Problem],
    ops: str,
    workers: int,
) -> Iterator[tuple[Cell, Outcome]]:
    """Outcomes as they come, from `workers` processes of one thread each.

    The tensors are too small to share among threads: on two busy cores, a second thread made a cell
    ten times slower.
    """
    names = {label: str(checkpoint) for label, checkpoint in checkpoints.items()}
    setup = with_models(partial(_evaluate, problems, ops), names)
    # High thresholds take most passes. They come first, so that no process works alone at the end
    longest_first = sorted(cells, key=lambda cell: -cell.tau_dec)
    return run_tasks(setup, longest_first, workers=workers)


def _evaluate(problems: list[task.Problem], ops: str, models: Models, cell: Cell) -> Outcome:
    return evaluate_cell(models.get(cell.model).model, problems, cell, ops)


_tokenizer = cache(build_tokenizer)


def as_json(outcomes: dict[Cell, Outcome]) -> list[dict[str, Any]]:
    return [{**asdict(cell), **asdict(Result.of(each))} for cell, each in outcomes.items()]
