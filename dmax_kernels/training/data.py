"""Conversations to batches: records read and tokenised, their order, the tokens of one step."""

from __future__ import annotations

import random
import reprlib
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from dmax_kernels.models.end_tokens import as_ids
from dmax_kernels.models.prompt_ids import has_chat_template, prompt_ids, render, text_ids

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


Records = Iterator[tuple[str, Any]]  # where it came from, record; a ValueError: it cannot be read


def read_dataset(name: str, config: str | None, split: str) -> Records:
    """(name[index], record) of a Hugging Face dataset."""
    try:
        import datasets  # only here: nothing else needs it
    except ModuleNotFoundError:
        raise ValueError(
            "dataset needs the Python package 'datasets': pip install datasets"
        ) from None
    for index, record in enumerate(datasets.load_dataset(name, config, split=split)):
        yield f"{name}[{index}]", record


def conversation(record: Any) -> list[dict[str, str]]:
    """Messages of {"messages": [{"role", "content"}, ...]} or of {"prompt", "response"}.

    Raises:
        ValueError: the record is no conversation; the message says what is wrong with it.
    """
    if isinstance(record, ValueError):
        raise record
    if not isinstance(record, dict):
        raise ValueError(f"must be an object, got {type(record).__name__}")
    if record.get("messages") is not None:
        messages = record["messages"]
        if not isinstance(messages, list) or not messages:
            raise ValueError("messages must be a list of at least one message")
    elif "prompt" in record and "response" in record:
        messages = [
            {"role": "user", "content": record["prompt"]},
            {"role": "assistant", "content": record["response"]},
        ]
    else:
        got = ", ".join(sorted(record)) or "no key"
        raise ValueError(f'needs "messages", or "prompt" and "response", got {got:.80}')
    for message in messages:
        for key in ("role", "content"):
            if not isinstance(message, dict) or not isinstance(message.get(key), str):
                # reprlib's is short, and does not go down what is nested deeply
                raise ValueError(f"each message needs a text {key!r}, got {reprlib.repr(message)}")
    return [{"role": m["role"], "content": m["content"]} for m in messages]


def encode(
    messages: list[dict[str, str]], tokenizer: Any, eos_token_id: int | Iterable[int]
) -> Example:
    """Token ids of the last assistant message (the response) and of all before it (the prompt).

    Both are tokenised apart, so that the prompt's ids are those that the decoder will be given.
    The response ends with its first end-of-sequence token; where it has none, the first of
    `eos_token_id` is added. A conversation whose last message is not the assistant's, or is empty,
    has an empty response.

    Raises:
        ValueError: the tokenizer or its chat template cannot take the messages.
    """
    if messages[-1]["role"] != "assistant" or not messages[-1]["content"].strip():
        return Example((), ())
    ends = as_ids(eos_token_id)
    prompt, text = prompt_ids(tokenizer, messages[:-1])
    answer = messages[-1]["content"]
    if has_chat_template(tokenizer):
        whole = render(tokenizer, messages, answer_follows=False)
        if not whole.startswith(text):
            raise ValueError("the chat template does not write the prompt first")
        answer = whole[len(text) :]
    response = text_ids(tokenizer, answer)
    end = next((i for i, token in enumerate(response) if token in ends), None)
    response = [*response, ends[0]] if end is None else response[: end + 1]
    return Example(tuple(prompt), tuple(response))


def read_examples(
    records: Records,
    tokenizer: Any,
    *,
    eos_token_id: int | Iterable[int],
    vocab_size: int,
    max_length: int | None,
    skip_malformed: bool = False,
    progress: bool = True,
) -> tuple[Examples, dict[str, int]]:
    """All examples and how many records were skipped, by reason.

    Skipped and counted: a record without a response token; one longer than `max_length` (the paper
    leaves out what is incomplete; nothing is cut); with `skip_malformed`, one that cannot be read,
    is no conversation, or that the chat template or the tokenizer refuses.

    Raises:
        ValueError: a malformed record, by file and line; or no record is left.
    """
    examples, first = Examples(), ""
    skipped = {"malformed": 0, "no response": 0, "too long": 0}
    for where, record in tqdm(records, desc="reading", unit="record", disable=not progress):
        try:
            example = encode(conversation(record), tokenizer, eos_token_id)
        except ValueError as error:
            reason = f"{where}: {' '.join(str(error).split())}"
            if not skip_malformed:
                raise ValueError(f"{reason} (--skip-malformed goes on)") from None
            skipped["malformed"] += 1
            first = first or f"; the first malformed: {reason}"
            continue
        ids = example.prompt + example.response
        if not example.response:
            skipped["no response"] += 1
        elif max_length is not None and len(ids) > max_length:
            skipped["too long"] += 1
        elif max(ids) >= vocab_size:
            raise ValueError(
                f"{where}: token ids must be in the model's vocabulary of {vocab_size}, got "
                f"{max(ids)}: the tokenizer is another model's"
            )
        else:
            examples.append(example, where)
    if not examples:
        counts = ", ".join(f"{count} {reason}" for reason, count in skipped.items() if count)
        raise ValueError(
            f"the data must hold at least one usable record, got {counts or 'none'}{first}"
        )
    return examples, {reason: count for reason, count in skipped.items() if count}


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
