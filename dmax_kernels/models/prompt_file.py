"""Prompts of a file in JSON lines, which `distill` and `evaluate` answer."""

from __future__ import annotations

import reprlib
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmax_kernels.files import read_jsonl
from dmax_kernels.models.pretrained import Loaded
from dmax_kernels.models.prompt_ids import Messages, padding, prompt_ids


@dataclass(frozen=True)
class Prompt:
    """A record of the file, and the messages that are put to the model."""

    where: str  # "FILE:LINE"
    record: dict[str, Any]
    messages: Messages
    field: str = "prompt"  # of the record, which holds the text if there is one


def read_prompts(
    paths: list[Path], what: str, *, field: str = "prompt", suffix: str = ""
) -> list[Prompt]:
    """The prompts of all files, in their order.

    A record holds a text in `field`, or a list "messages", of which an assistant's message at the
    end is left out: it is what the model is to write. `suffix` is put after the prompt's text, or
    after the last message.

    Raises:
        ValueError: a record is malformed (named by file and line), or there is none.
    """
    prompts = []
    for path in paths:
        for where, record in read_jsonl(path, what):
            try:
                prompts.append(Prompt(where, record, messages_of(record, field, suffix), field))
            except ValueError as error:
                raise ValueError(f"{where}: {' '.join(str(error).split())}") from None
    if not prompts:
        raise ValueError(f"{what} must hold at least one prompt, got none")
    return prompts


def messages_of(record: Any, field: str, suffix: str) -> Messages:
    if isinstance(record, ValueError):
        raise record
    if not isinstance(record, dict):
        raise ValueError(f"must be an object, got {type(record).__name__}")
    if isinstance(record.get(field), str):
        return [{"role": "user", "content": record[field] + suffix}]
    messages = record.get("messages")
    if not isinstance(messages, list) or not messages:
        need = f'a text "{field}" or a list of at least one message "messages"'
        raise ValueError(f"must have {need}, got {reprlib.repr(record)}")
    for message in messages:
        for key in ("role", "content"):
            if not isinstance(message, dict) or not isinstance(message.get(key), str):
                raise ValueError(f"each message needs a text {key!r}, got {reprlib.repr(message)}")
    plain = [{"role": each["role"], "content": each["content"]} for each in messages]
    if plain[-1]["role"] == "assistant":
        del plain[-1]
    if not plain:
        raise ValueError("messages must hold one before the assistant's, got none")
    plain[-1]["content"] += suffix
    return plain


def encode_prompts(
    loaded: Loaded, prompts: list[Prompt], *, raw: bool = False, pad: bool | None = None
) -> list[list[int]]:
    """Token ids as `generate` makes them; `pad`: see `prompt_ids` (None: as the model needs)."""
    wanted = loaded.defaults.pad_prompts if pad is None else pad
    pad_to = padding(loaded.tokenizer, loaded.defaults.block_length, wanted)
    encoded = []
    for prompt in prompts:
        try:
            ids, _ = prompt_ids(loaded.tokenizer, prompt.messages, raw=raw, pad_to=pad_to)
        except ValueError as error:
            raise ValueError(f"{prompt.where}: {error}") from None
        if not ids:
            raise ValueError(f"{prompt.where}: the prompt must have at least one token, got none")
        encoded.append(ids)
    return encoded


def fingerprint(prompts: list[Prompt]) -> str:
    """Identifies the prompts: a run is resumed only on those that it began with."""
    checksum = 0
    for prompt in prompts:
        for message in prompt.messages:
            for text in (message["role"], message["content"]):
                checksum = zlib.crc32(f"{text}\0".encode("utf-8", "surrogatepass"), checksum)
    return f"{len(prompts)} prompts, crc {checksum:08x}"
