"""Conversations to batches: records read and tokenised, their order, the tokens of one step."""

from __future__ import annotations

import random
import reprlib
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from tqdm import tqdm

from dmax_kernels.models.end_tokens import as_ids
from dmax_kernels.models.prompt_ids import has_chat_template, prompt_ids, render, text_ids
from dmax_kernels.training.corrupt import IGNORE, TrainBatch

# From a step's number, the examples of that step and of all later ones, without end
Stream = Callable[[int], Iterator[list["Example"]]]


@dataclass(frozen=True)
class Example:
    """Token ids. The response ends with its first end-of-sequence token."""

    prompt: tuple[int, ...]
    response: tuple[int, ...]
    name: str = ""  # where it came from, such as "file:line"

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + len(self.response)


class Examples(Sequence):
    """Examples in flat arrays of 4 bytes per token, where Python's own ints would take 36."""

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

    def longest_row(self, block_length: int, eos_tail: str) -> int:
        """The positions that the longest example takes in a batch, with its tail."""
        longest = max(end - begin for begin, end in pairwise(self._ends))
        return whole_blocks(learnt_end(longest, block_length, eos_tail), block_length)

    @property
    def fingerprint(self) -> str:
        """Identifies the data: a run is resumed only on the data that it began with."""
        checksum = zlib.crc32(self._prompts.tobytes(), zlib.crc32(self._tokens.tobytes()))
        return f"{len(self)} examples, {self.num_tokens} tokens, crc {checksum:08x}"


# Where a record came from, and the record, or a ValueError that says why it cannot be read
Records = Iterator[tuple[str, Any]]


def read_dataset(name: str, config: str | None, split: str) -> Records:
    """(name[index], record) of a Hugging Face dataset."""
    try:
        import datasets  # imported here because nothing else needs it
    except ModuleNotFoundError:
        raise ValueError(
            "dataset needs the Python package 'datasets': pip install datasets"
        ) from None
    for index, record in enumerate(datasets.load_dataset(name, config, split=split)):
        yield f"{name}[{index}]", record


def conversation(record: Any) -> list[dict[str, str]]:
    """The messages in {"messages": [{"role", "content"}, ...]} or {"prompt", "response"}.

    Raises:
        ValueError: the record is not a conversation; the message says why.
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
                # reprlib cuts what is long or deeply nested
                raise ValueError(f"each message needs a text {key!r}, got {reprlib.repr(message)}")
    return [{"role": m["role"], "content": m["content"]} for m in messages]


def encode(
    messages: list[dict[str, str]],
    tokenizer: Any,
    eos_token_id: int | Iterable[int],
    pad_to: int | None = None,
) -> Example:
    """Token ids of the last assistant message (the response) and of everything before (the prompt).

    The two are tokenised separately, so that the prompt's ids are those that the decoder will get.
    The response ends with its first end-of-sequence token; if it has none, the first of
    `eos_token_id` is added. If the last message is empty or not the assistant's, the response is
    empty. `pad_to`: see `prompt_ids`.

    Raises:
        ValueError: the tokenizer or its chat template cannot take the messages.
    """
    if messages[-1]["role"] != "assistant" or not messages[-1]["content"].strip():
        return Example((), ())
    ends = as_ids(eos_token_id)
    prompt, text = prompt_ids(tokenizer, messages[:-1], pad_to=pad_to)
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
    pad_to: int | None = None,
    skip_malformed: bool = False,
    progress: bool = True,
) -> tuple[Examples, dict[str, int]]:
    """All examples, and the number of skipped records for each reason.

    A record is skipped if it has no response token, or if it is longer than `max_length` (nothing
    is cut: the paper leaves out incomplete responses). With `skip_malformed`, a record is also
    skipped if it cannot be read, is not a conversation, or is refused by the chat template or the
    tokenizer.

    Raises:
        ValueError: a record is malformed (named by file and line), or no record is left.
    """
    examples, first_malformed = Examples(), ""
    skipped = {"malformed": 0, "no response": 0, "too long": 0}
    for where, record in tqdm(records, desc="reading", unit="record", disable=not progress):
        try:
            example = encode(conversation(record), tokenizer, eos_token_id, pad_to)
        except ValueError as error:
            reason = f"{where}: {' '.join(str(error).split())}"
            if not skip_malformed:
                raise ValueError(f"{reason} (--skip-malformed skips it)") from None
            skipped["malformed"] += 1
            first_malformed = first_malformed or f"; the first malformed: {reason}"
            continue
        ids = example.prompt + example.response
        if not example.response:
            skipped["no response"] += 1
        elif max_length is not None and len(ids) > max_length:
            skipped["too long"] += 1
        elif max(ids) >= vocab_size:
            raise ValueError(
                f"{where}: token ids must be in the model's vocabulary of {vocab_size}, got "
                f"{max(ids)}: the tokenizer belongs to a different model"
            )
        else:
            examples.append(example, where)
    if not examples:
        counts = ", ".join(f"{count} {reason}" for reason, count in skipped.items() if count)
        raise ValueError(
            f"the data must hold at least one usable record, got {counts or 'none'}"
            f"{first_malformed}"
        )
    return examples, {reason: count for reason, count in skipped.items() if count}


def epochs(examples: Sequence[Example], batch_size: int, seed: int) -> Stream:
    """The examples over and over, newly shuffled for each epoch; a batch may span two epochs."""

    def stream(first_step: int) -> Iterator[list[Example]]:
        size, begin = len(examples), first_step * batch_size
        epoch, order = -1, []
        while True:
            batch = []
            for position in range(begin, begin + batch_size):
                if position // size != epoch:
                    epoch = position // size
                    order = list(range(size))
                    random.Random(f"epoch {seed} {epoch}").shuffle(order)
                batch.append(examples[order[position % size]])
            begin += batch_size
            yield batch

    return stream


def learnt_end(length: int, block_length: int, eos_tail: str) -> int:
    """Where the learnt tail ends, after a prompt and response of `length` tokens together.

    See `TrainConfig.eos_tail`.
    """
    if eos_tail == "released":
        return length + block_length - 1  # the response's own last token is the first of the tail
    return whole_blocks(length, block_length)


def whole_blocks(length: int, block_length: int) -> int:
    return -(-length // block_length) * block_length


def collate(
    examples: Sequence[Example], block_length: int, eos_token_id: int, eos_tail: str
) -> TrainBatch:
    """One batch of these examples, padded with end-of-sequence tokens."""
    starts = torch.tensor([[len(example.prompt)] for example in examples])
    ends = [learnt_end(example.num_tokens, block_length, eos_tail) for example in examples]
    length = whole_blocks(max(ends), block_length)
    rows = [example.prompt + example.response for example in examples]
    tokens = torch.tensor([ids + (eos_token_id,) * (length - len(ids)) for ids in rows])
    filled = torch.tensor([[whole_blocks(end, block_length)] for end in ends])
    place = torch.arange(length)
    learnt = (place >= starts) & (place < torch.tensor(ends)[:, None])
    editable = (place >= starts) & (place < filled)
    return TrainBatch(tokens, editable, tokens.masked_fill(~learnt, IGNORE), block_length)
