"""Conversations from JSONL files or a Hugging Face dataset, tokenised, the response marked."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Iterator
from typing import Any

from tqdm import tqdm

from dmax_kernels.files import read_jsonl as read_jsonl  # the other source beside read_dataset
from dmax_kernels.models.end_tokens import as_ids
from dmax_kernels.models.prompt_ids import has_chat_template, prompt_ids, render, text_ids
from dmax_kernels.training.data import Example, Examples

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
