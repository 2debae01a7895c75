"""Examples, their order over epochs, and the clean tokens of one step."""

from __future__ import annotations

import random
import zlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

IGNORE = -100  # a position whose token is not learnt

# From a step's number on: the examples of that step and of each one after it. Without end.
Stream = Callable[[int], Iterator[list["Example"]]]


@dataclass(frozen=True)
class Example:
    """Token ids. The response ends with its first end-of-sequence token."""

    prompt: tuple[int, ...]
    response: tuple[int, ...]
    name: str = ""  # where it came from: "file:line"


class Examples(Sequence):
    """Examples in flat arrays, 4 bytes a token: Python's ints would take 36."""

    def __init__(self) -> None:
        self._tokens = array("i")
        self._ends = array("q", [0])
        self._prompts = array("i")
        self._names: list[str] = []

    def append(self, example: Example, name: str) -> None:
        self._tokens.extend(example.prompt)
        self._tokens.extend(example.response)
        self._ends.append(len(self._tokens))
        self._prompts.append(len(example.prompt))
        self._names.append(name)

    def __len__(self) -> int:
        return len(self._prompts)

    def __getitem__(self, i: int) -> Example:
        ids = self._tokens[self._ends[i] : self._ends[i + 1]].tolist()
        prompt = self._prompts[i]
        return Example(tuple(ids[:prompt]), tuple(ids[prompt:]), self._names[i])

    @property
    def num_tokens(self) -> int:
        return len(self._tokens)

    @property
    def fingerprint(self) -> str:
        """Tells other data from this: a run is resumed on what it began with."""
        checksum = zlib.crc32(self._prompts.tobytes(), zlib.crc32(self._tokens.tobytes()))
        return f"{len(self)} examples, {self.num_tokens} tokens, crc {checksum:08x}"


def epochs(examples: Sequence[Example], batch_size: int, seed: int) -> Stream:
    """The examples again and again, shuffled anew for each epoch; a batch may span two epochs."""

    def stream(first: int) -> Iterator[list[Example]]:
        size, at = len(examples), first * batch_size
        epoch, order = -1, []
        while True:
            batch = []
            for position in range(at, at + batch_size):
                if position // size != epoch:
                    epoch = position // size
                    order = list(range(size))
                    random.Random(f"epoch {seed} {epoch}").shuffle(order)
                batch.append(examples[order[position % size]])
            at += batch_size
            yield batch

    return stream


@dataclass(frozen=True)
class Batch:
    """Clean tokens of one step, in whole blocks: [prompt | response | eos ... | eos ...].

    Rows differ in length. A row's own last block is filled with end-of-sequence tokens, as the
    decoder fills it; the blocks after it are padding that no token of the row ever attends to, for
    attention is causal between blocks. No mask over padding is needed.
    """

    tokens: Tensor  # int64 [B, L]
    editable: Tensor  # bool [B, L]: response and tail, which may be masked; never the prompt
    target: Tensor  # int64 [B, L]: the token where it is learnt, else IGNORE
    num_tokens: int  # prompt and response tokens, without padding
    names: tuple[str, ...]

    def rows(self, index: Sequence[int], block_length: int) -> tuple[Batch, slice]:
        """These rows, and the positions kept of them: the blocks in which one of them is edited."""
        rows = torch.as_tensor(index)
        edited = self.editable[rows].any(0).nonzero()
        start = int(edited[0]) // block_length * block_length
        end = (int(edited[-1]) // block_length + 1) * block_length
        part = Batch(
            self.tokens[rows, :end],
            self.editable[rows, start:end],
            self.target[rows, start:end],
            0,
            tuple(self.names[i] for i in index),
        )
        return part, slice(start, end)


def collate(
    examples: Sequence[Example], block_length: int, eos_token_id: int, eos_tail: str
) -> Batch:
    """One batch of these examples; see `TrainConfig.eos_tail` for which tail tokens are learnt."""
    rows = []
    for example in examples:
        end = len(example.prompt) + len(example.response)
        # The response's own last token is the first of the tail
        learnt = (
            end + block_length - 1
            if eos_tail == "released"
            else -(-end // block_length) * block_length
        )
        rows.append((len(example.prompt), learnt, -(-learnt // block_length) * block_length))
    length = max(whole for _, _, whole in rows)
    tokens = torch.full((len(rows), length), eos_token_id)
    editable = torch.zeros(len(rows), length, dtype=torch.bool)
    target = torch.full((len(rows), length), IGNORE)
    for i, (example, (begin, learnt, whole)) in enumerate(zip(examples, rows, strict=True)):
        ids = torch.tensor(example.prompt + example.response)
        tokens[i, : len(ids)] = ids
        editable[i, begin:whole] = True
        target[i, begin:learnt] = tokens[i, begin:learnt]
    return Batch(
        tokens,
        editable,
        target,
        sum(len(example.prompt) + len(example.response) for example in examples),
        tuple(example.name for example in examples),
    )
