"""The recipe's batches: all walks of a batch have one shape, so that no row is padded."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

from dmax_kernels.ring_walk import task
from dmax_kernels.ring_walk.stages import WalkStage
from dmax_kernels.training.data import Example, Stream


def ring_walk_examples(num_moves: int, block_length: int, seed: int) -> Iterator[Example]:
    """Endless training problems with correct derivations; the prompts fill whole blocks."""
    rng = random.Random(f"ring walk training {num_moves} {seed}")
    while True:
        problem = task.draw_problem(rng, num_moves)
        yield Example(
            prompt=tuple(task.encode_prompt(problem, block_length)),
            response=tuple(task.encode(task.render_response(problem, rng))),
            name=" ".join(task.render_prompt(problem)),
        )


def repeated_examples(examples: list[Example], seed: int) -> Iterator[Example]:
    """The same examples over and over, newly shuffled for each epoch."""
    rng = random.Random(f"epochs {seed}")
    while True:
        order = list(range(len(examples)))
        rng.shuffle(order)
        for i in order:
            yield examples[i]


def batches(
    examples: Iterable[Example], block_length: int, batch_size: int
) -> Iterator[list[Example]]:
    """Groups a stream into batches of one prompt length and one number of response blocks."""
    waiting: dict[tuple[int, int], list[Example]] = {}
    for example in examples:
        shape = len(example.prompt), -(-len(example.response) // block_length)
        rows = waiting.setdefault(shape, [])
        rows.append(example)
        if len(rows) == batch_size:
            yield rows
            waiting[shape] = []


def stage_stream(stage: WalkStage, examples: list[Example] | None) -> Stream:
    """The stage's batches."""
    config = stage.config

    def source() -> Iterator[Example]:
        if stage.data == "distilled":
            return repeated_examples(examples, config.seed)
        return ring_walk_examples(stage.num_moves, config.block_length, config.seed)

    return stream_of(source, config.block_length, config.batch_size)


def stream_of(
    source: Callable[[], Iterator[Example]], block_length: int, batch_size: int
) -> Stream:
    """The batches of `source()`; from a later step on, the earlier ones are drawn and dropped."""

    def stream(first_step: int) -> Iterator[list[Example]]:
        return islice(batches(source(), block_length, batch_size), first_step, None)

    return stream
