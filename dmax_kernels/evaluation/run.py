"""The cells of an evaluation, each in one of several processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from dmax_kernels.decoding import DecodeConfig
from dmax_kernels.decoding.rules import find_rule
from dmax_kernels.evaluation.cells import Cell, Grade, Outcome, Problem, run_cell
from dmax_kernels.models.prompt_file import Prompt, encode_prompts
from dmax_kernels.models.workers import Models, run_tasks, with_models


@dataclass(frozen=True)
class Evaluation:
    """What is decoded and how, in a form that other processes can receive.

    options: of `spd_generate`, given by the user; what the model's defaults say is filled in.
    """

    prompts: list[Prompt]
    grade: Grade
    options: dict[str, Any] = field(default_factory=dict)
    batch_size: int | None = None
    raw: bool = False
    pad: bool | None = None

    def run(self, models: Models, cell: Cell, on_batch: Callable[[int], None]) -> Outcome:
        loaded = models.get(cell.model)
        encoded = encode_prompts(loaded, self.prompts, raw=self.raw, pad=self.pad)
        problems = [
            Problem(ids, prompt.record, number)
            for number, (ids, prompt) in enumerate(zip(encoded, self.prompts, strict=True))
        ]
        options = loaded.decode_options(self.options)
        for name in ("rule", "tau_dec", "convergence"):  # which a cell has
            options.pop(name, None)
        return run_cell(
            *(loaded.model, loaded.tokenizer, problems, cell, self.grade, options),
            batch_size=self.batch_size,
            on_batch=on_batch,
        )

    def __call__(self, models: Models, cell: Cell) -> Outcome:
        return self.run(models, cell, lambda count: None)

    def check(self, cells: list[Cell]) -> None:
        """Refuses settings that no model could take, before minutes of decoding."""
        for cell in cells:
            given = {"rule": cell.rule, "tau_dec": cell.tau_dec, "convergence": cell.convergence}
            find_rule(DecodeConfig(**{**self.options, **given}))


def evaluate(
    evaluation: Evaluation,
    cells: list[Cell],
    names: dict[str, str],
    *,
    workers: int = 1,
    threads: int = 1,
    on_batch: Callable[[int], None] = lambda count: None,
    **options: Any,
) -> Iterator[tuple[Cell, Outcome]]:
    """Outcomes as they come.

    Args:
        names, options: of `Models`.
        on_batch: told of the problems of each batch in one process, else of each cell.
    """
    if workers == 1:
        function = partial(Evaluation.run, evaluation, on_batch=on_batch)
        yield from run_tasks(with_models(function, names, **options), cells)
        return
    setup = with_models(evaluation, names, **options)
    for cell, outcome in run_tasks(setup, cells, workers=workers, threads=threads):
        on_batch(outcome.problems)
        yield cell, outcome
