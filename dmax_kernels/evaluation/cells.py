"""One way to decode, over all problems: what happened to each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dmax_kernels.decoding import GenerationOutput, Rule, spd_generate
from dmax_kernels.decoding.extra import arness

# After this many problems a cell goes on only if it has not collapsed (see `run_cell`)
FIRST_PROBLEMS = 50


@dataclass(frozen=True)
class Cell:
    """One way to decode: a model, a rule of `spd_generate`, and its settings."""

    model: str
    rule: str | Rule
    tau_dec: float
    convergence: str = "both"
    trace: bool = False  # also measure the ARness


@dataclass(frozen=True)
class Problem:
    """A prompt's token ids, the record that says what is right, and the problem's number."""

    ids: Sequence[int]
    record: dict[str, Any]
    number: int = 0


@dataclass(frozen=True)
class Response:
    """What a model answered.

    Attributes:
        token_ids: up to and including the first end-of-sequence token.
        complete: whether there is one.
        text: without special tokens.
    """

    token_ids: list[int]
    complete: bool
    text: str


# From a response and its problem's record, whether it is right by each measure
Grade = Callable[[Response, dict[str, Any]], dict[str, bool]]


@dataclass
class Outcome:
    """What happened to each problem, in order. With `collapsed`, the later problems are missing."""

    right: dict[str, list[bool]] = field(default_factory=dict)  # by measure
    tokens: list[int] = field(default_factory=list)  # up to and including the end of sequence
    complete: list[bool] = field(default_factory=list)
    forwards: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    arness: list[float] = field(default_factory=list)  # Global-ARness@1, if the cell asks for it
    seconds: float = 0.0  # of prefill and decoding
    collapsed: bool = False

    @property
    def problems(self) -> int:
        return len(self.tokens)

    def share(self, measure: str) -> float:
        """The share that is right, in [0, 1]."""
        return sum(self.right[measure]) / self.problems

    def tokens_per_forward(self, average: str = "mean", *, count_eos: bool = True) -> float:
        """Tokens over denoising passes.

        Args:
            average: "mean" of the problems' ratios, or the ratio of the "sum"s.
            count_eos: whether the end-of-sequence token counts as one of the tokens. The authors'
                script prints the mean without it.
        """
        tokens = self.tokens
        if not count_eos:
            tokens = [n - ends for n, ends in zip(tokens, self.complete, strict=True)]
        if average == "sum":
            return sum(tokens) / sum(self.forwards)
        ratios = [n / passes for n, passes in zip(tokens, self.forwards, strict=True)]
        return sum(ratios) / len(ratios)

    @property
    def forwards_per_block(self) -> float:
        return sum(self.forwards) / sum(self.blocks)

    @property
    def tokens_per_second(self) -> float:
        return sum(self.tokens) / max(self.seconds, 1e-9)


def with_seeds(options: dict[str, Any], numbers: Sequence[int]) -> dict[str, Any]:
    """Options of `spd_generate` for the prompts of these numbers: prompt n has the seed `seed` + n,
    so that neither batches nor processes show in what is sampled."""
    if not options.get("temperature"):
        return options
    seed = options.get("seed", 0)
    return {**options, "seed": [(seed + n) % (1 << 63) for n in numbers]}


def decode(
    model: Any, problems: Sequence[Problem], cell: Cell, options: dict[str, Any]
) -> GenerationOutput:
    """`options` are those of `spd_generate` that are the same in all cells."""
    return spd_generate(
        model,
        [torch.as_tensor(problem.ids) for problem in problems],
        tau_dec=cell.tau_dec,
        rule=cell.rule,
        convergence=cell.convergence,
        trace=cell.trace,
        **with_seeds(options, [problem.number for problem in problems]),
    )


def run_cell(
    model: Any,
    tokenizer: Any,
    problems: Sequence[Problem],
    cell: Cell,
    grade: Grade,
    options: dict[str, Any],
    *,
    batch_size: int | None = None,
    on_batch: Callable[[int], None] = lambda count: None,
) -> Outcome:
    """Decodes and grades the problems, first `FIRST_PROBLEMS` of them, then the others.

    The others are left out where the first ones collapse: where none is right by the strictest
    measure, and their blocks use more than half of their step cap on average. Such a cell costs ten
    times the passes of the others, and further problems would only repeat its zero.

    Args:
        batch_size: problems that are decoded together; None for as many as there are.
        on_batch: called with the number of problems after each batch.
    """
    outcome = Outcome()
    cap = options.get("max_steps_per_block") or options["block_length"]
    for group in (problems[:FIRST_PROBLEMS], problems[FIRST_PROBLEMS:]):
        if outcome.collapsed:
            break
        for batch in in_batches(group, batch_size):
            add_batch(outcome, model, tokenizer, batch, cell, grade, options)
            on_batch(len(batch))
        some_right = all(any(graded) for graded in outcome.right.values())
        outcome.collapsed = not some_right and outcome.forwards_per_block > cap / 2
    return outcome


def in_batches(items: Sequence[Any], size: int | None) -> Iterator[Sequence[Any]]:
    size = size or max(len(items), 1)
    for begin in range(0, len(items), size):
        yield items[begin : begin + size]


def add_batch(
    outcome: Outcome,
    model: Any,
    tokenizer: Any,
    problems: Sequence[Problem],
    cell: Cell,
    grade: Grade,
    options: dict[str, Any],
) -> None:
    output = decode(model, problems, cell, options)
    ends = options["eos_token_id"]
    for problem, token_ids in zip(problems, output.answers, strict=True):
        complete = token_ids[-1] in ends
        text = tokenizer.decode(token_ids, skip_special_tokens=True)
        graded = grade(Response(token_ids, complete, text), problem.record)
        if outcome.right and graded.keys() != outcome.right.keys():
            names = [", ".join(measures) or "none" for measures in (outcome.right, graded)]
            raise ValueError(
                f"a grade must have the same measures each time, {names[0]}, got {names[1]}"
            )
        for measure, is_right in graded.items():
            outcome.right.setdefault(measure, []).append(is_right)
        outcome.complete.append(complete)
        outcome.texts.append(text)
    outcome.tokens += output.num_tokens.tolist()
    outcome.forwards += output.num_forwards.tolist()
    outcome.blocks += output.num_blocks.tolist()
    outcome.seconds += output.statistics.prefill_seconds + output.statistics.decode_seconds
    if output.trace is not None:
        lengths = [len(problem.ids) for problem in problems]
        ends_at = [n + t for n, t in zip(output.num_tokens.tolist(), lengths, strict=True)]
        outcome.arness += arness(output.trace, ends=ends_at)
