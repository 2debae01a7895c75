"""Conversations from JSONL files or a Hugging Face dataset, tokenised, the response marked."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dmax_kernels.training.data import Example, Examples


class MalformedRecord(ValueError):
    """A record that is not a conversation; the message says what is wrong with it."""


def read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    """(file:line, record) of each line that is not blank; the record is a `MalformedRecord` where
    the line is not JSON."""
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except (json.JSONDecodeError, UnicodeDecodeError) as error:
                    record = MalformedRecord(f"not JSON ({error})")
                yield f"{path}:{number}", record
    except FileNotFoundError:
        raise ValueError(f"data must be JSONL files, got no file {path}") from None


def read_dataset(name: str, config: str | None, split: str) -> Iterator[tuple[str, Any]]:
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
    """Messages of {"messages": [{"role", "content"}, ...]} or of {"prompt", "response"}."""
    if isinstance(record, MalformedRecord):
        raise record
    if not isinstance(record, dict):
        raise MalformedRecord(f"must be an object, got {type(record).__name__}")
    if record.get("messages") is not None:
        messages = record["messages"]
        if not isinstance(messages, list) or not messages:
            raise MalformedRecord("messages must be a list of at least one message")
    elif "prompt" in record and "response" in record:
        messages = [
            {"role": "user", "content": record["prompt"]},
            {"role": "assistant", "content": record["response"]},
        ]
    else:
        got = ", ".join(sorted(record)) or "no key"
        raise MalformedRecord(f'needs "messages", or "prompt" and "response", got {got}')
    for message in messages:
        for key in ("role", "content"):
            if not isinstance(message, dict) or not isinstance(message.get(key), str):
                raise MalformedRecord(f"each message needs a text {key!r}, got {message!r:.80}")
    return [{"role": m["role"], "content": m["content"]} for m in messages]


def encode(messages: list[dict[str, str]], tokenizer: Any, eos_token_id: int) -> Example:
    """Token ids of the last assistant message (the response) and of all before it (the prompt).

    Both are tokenised apart, so that the prompt's ids are those that the decoder will be given.
    The response ends with its first end-of-sequence token, which is added where there is none; a
    conversation whose last message is not the assistant's, or is empty, has an empty response.
    """
    if messages[-1]["role"] != "assistant" or not messages[-1]["content"].strip():
        return Example((), ())
    if getattr(tokenizer, "chat_template", None):
        render = tokenizer.apply_chat_template
        prompt = render(messages[:-1], tokenize=False, add_generation_prompt=True)
        whole = render(messages, tokenize=False)
        if not whole.startswith(prompt):
            raise MalformedRecord("the chat template does not write the prompt first")
        response = whole[len(prompt) :]
    elif len(messages) == 2:
        prompt, response = messages[0]["content"], messages[1]["content"]
    else:
        raise ValueError(
            "the tokenizer has no chat template: records must be one prompt and one response, "
            f"got {len(messages)} messages"
        )
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, response)]
    if eos_token_id not in ids[1]:
        ids[1].append(eos_token_id)
    return Example(tuple(ids[0]), tuple(ids[1][: ids[1].index(eos_token_id) + 1]))


def read_examples(
    records: Iterator[tuple[str, Any]],
    tokenizer: Any,
    *,
    eos_token_id: int,
    vocab_size: int,
    max_length: int | None,
    skip_malformed: bool = False,
    progress: bool = True,
) -> tuple[Examples, dict[str, int]]:
    """All examples and how many records were skipped, by reason.

    Skipped and counted: a record without a response token; one longer than `max_length` (the paper
    leaves out what is incomplete; nothing is cut); with `skip_malformed`, one that is no
    conversation.

    Raises:
        ValueError: a malformed record, by file and line; or no record is left.
    """
    examples = Examples()
    skipped = {"malformed": 0, "no response": 0, "too long": 0}
    for where, record in tqdm(records, desc="reading", unit="record", disable=not progress):
        try:
            example = encode(conversation(record), tokenizer, eos_token_id)
        except MalformedRecord as error:
            if not skip_malformed:
                raise ValueError(f"{where}: {error} (--skip-malformed goes on)") from None
            skipped["malformed"] += 1
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
        raise ValueError(f"the data must hold at least one usable record, got {counts or 'none'}")
    return examples, {reason: count for reason, count in skipped.items() if count}
