"""Decodes ring walks and grades them: for the recipe's log, and for the cells of `demo`."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from typing import Any

import torch

from dmax_kernels.decoding import GenerationOutput, Rule, spd_generate
from dmax_kernels.decoding.extra import arness
from dmax_kernels.models.checkpoint import SHIPPED, load_checkpoint
from dmax_kernels.ring_walk import task

MODELS = SHIPPED
TAUS = (0.95, 0.5, 0.0)
# More thresholds for the control, to find what self-distillation alone reaches at its best
CONTROL_TAUS = (0.9, 0.85, 0.8, 0.7)
MAX_NEW_TOKENS = 96  # three blocks of 32: the longest right derivation of 6 moves has 73 tokens
# After this many problems a cell goes on only if it has not collapsed (see `evaluate_cell`)
FIRST_PROBLEMS = 50


@dataclass(frozen=True)
class Cell:
    """One way to decode: a checkpoint, a rule of `spd_generate`, and its settings."""

    model: str
    rule: str | Rule
    tau_dec: float
    convergence: str = "both"
    trace: bool = False  # also measure the ARness


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


def decode(
    model: Any, problems: list[task.Problem], cell: Cell, ops: str, trace: bool = False
) -> GenerationOutput:
    return spd_generate(
        model,
        encode_prompts(problems, model.config.block_length),
        block_length=model.config.block_length,
        max_new_tokens=MAX_NEW_TOKENS,
        tau_dec=cell.tau_dec,
        rule=cell.rule,
        convergence=cell.convergence,
        ops=ops,
        trace=trace,
    )


def response_words(output: GenerationOutput) -> list[list[str]]:
    """Each row's decoded words, up to and including its first eos."""
    return [task.decode(answer) for answer in output.answers]


def evaluate_cell(model: Any, problems: list[task.Problem], cell: Cell, ops: str) -> Result:
    """Decode the problems in two batches; the second is left out where the first collapses.

    A cell collapses when no derivation is right and its blocks use more than half of their step cap
    on average. Such a cell costs ten times the passes of the others, and further problems would
    only repeat its zero. Its result says how many problems were decoded.
    """
    outputs, grades, scores, collapsed = [], [], [], False
    for batch in (problems[:FIRST_PROBLEMS], problems[FIRST_PROBLEMS:]):
        if not batch or collapsed:
            break
        output = decode(model, batch, cell, ops, cell.trace)
        outputs.append(output)
        if cell.trace:
            prompt_length = output.sequences.shape[1] - MAX_NEW_TOKENS
            scores += arness(output.trace, ends=(output.num_tokens + prompt_length).tolist())
        grades += map(task.grade, batch, response_words(output))
        blocks = sum(int(output.num_blocks.sum()) for output in outputs)
        passes = sum(int(output.num_forwards.sum()) for output in outputs)
        right = any(grade.strict for grade in grades)
        collapsed = not right and passes > blocks * model.config.block_length / 2

    tokens = torch.cat([output.num_tokens for output in outputs])
    forwards = torch.cat([output.num_forwards for output in outputs])
    return Result(
        answer=sum(grade.answer for grade in grades) / len(grades),
        strict=sum(grade.strict for grade in grades) / len(grades),
        tokens_per_forward=float((tokens.float() / forwards).mean()),
        forwards_per_block=passes / blocks,
        problems=len(grades),
        collapsed=collapsed,
        arness=sum(scores) / len(scores) if scores else None,
    )


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
    if workers == 1:
        _load(checkpoints, problems, ops)
        yield from map(_evaluate, cells)
        return
    executor = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),  # a fork would copy torch's thread pools
        initializer=_load,
        initargs=(checkpoints, problems, ops, True),
    )
    try:
        for done in as_completed([executor.submit(_evaluate, cell) for cell in cells]):
            yield done.result()
    finally:
        executor.shutdown(cancel_futures=True)


# One worker's models and problems, loaded once
_loaded: dict[str, Any] = {}


def _load(
    checkpoints: dict[str, Any],
    problems: list[task.Problem],
    ops: str,
    is_worker: bool = False,
) -> None:
    if is_worker:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent reports an interrupt, in one line
        torch.set_num_threads(1)
    models = {name: load_checkpoint(checkpoint)[0] for name, checkpoint in checkpoints.items()}
    _loaded.update(models=models, problems=problems, ops=ops)


def _evaluate(cell: Cell) -> tuple[Cell, Result]:
    model = _loaded["models"][cell.model]
    return cell, evaluate_cell(model, _loaded["problems"], cell, _loaded["ops"])


def as_json(results: dict[Cell, Result]) -> list[dict[str, Any]]:
    return [{**asdict(cell), **asdict(result)} for cell, result in results.items()]
