"""Batches of clean tokens, [prompt | response], in whole blocks and without ragged rows."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dmax_kernels.models import ring_walk


@dataclass(frozen=True)
class Example:
    """Token ids. The prompt fills whole blocks; the response ends with its first `<eos>`."""

    prompt: tuple[int, ...]
    response: tuple[int, ...]


@dataclass(frozen=True)
class Batch:
    """Clean tokens int64 [B, L]; the first `prompt_length` positions are the prompt's.

    The response is followed by `<eos>` to the end of the block that holds its first one: these are
    learnt too, as the decoder fills that block to its end.
    """

    tokens: Tensor
    prompt_length: int

    @property
    def response(self) -> Tensor:
        return self.tokens[:, self.prompt_length :]


def ring_walk_examples(num_moves: int, block_length: int, seed: int) -> Iterator[Example]:
    """An endless stream of training problems with right derivations."""
    rng = random.Random(f"ring walk training {num_moves} {seed}")
    while True:
        problem = ring_walk.draw_problem(rng, num_moves)
        yield Example(
            prompt=tuple(ring_walk.encode_prompt(problem, block_length)),
            response=tuple(ring_walk.encode(ring_walk.render_response(problem, rng))),
        )


def repeated_examples(examples: list[Example], seed: int) -> Iterator[Example]:
    """The same examples again and again, shuffled anew for each epoch."""
    if not examples:
        raise ValueError("repeated_examples: examples must hold at least one, got none")
    rng = random.Random(f"epochs {seed}")
    while True:
        order = list(range(len(examples)))
        rng.shuffle(order)
        for i in order:
            yield examples[i]


def batches(examples: Iterable[Example], block_length: int, batch_size: int) -> Iterator[Batch]:
    """Groups a stream into batches of one shape: no padding beyond a response's last block."""
    waiting: dict[tuple[int, int], list[list[int]]] = {}
    for example in examples:
        response = list(example.response)
        response += [ring_walk.EOS_ID] * (-len(response) % block_length)
        rows = waiting.setdefault((len(example.prompt), len(response)), [])
        rows.append([*example.prompt, *response])
        if len(rows) == batch_size:
            yield Batch(torch.tensor(rows), prompt_length=len(example.prompt))
            rows.clear()
