"""From messages to token ids, in one place because `train` and `generate` must agree."""

from __future__ import annotations

from typing import Any

Messages = list[dict[str, str]]


def has_chat_template(tokenizer: Any) -> bool:
    return bool(getattr(tokenizer, "chat_template", None))


def render(tokenizer: Any, messages: Messages, *, answer_follows: bool) -> str:
    """The chat template's text for the messages; a ValueError of one line if it refuses them."""
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=answer_follows
        )
    except ImportError:  # jinja2 is missing, which is not the messages' fault
        raise
    except Exception as error:  # a template is a program and may raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"the chat template refuses the messages ({reason})") from None


def padding(tokenizer: Any, block_length: int, wanted: bool) -> int | None:
    """`prompt_ids`' `pad_to`: the block length where padding is wanted."""
    if wanted and tokenizer.pad_token_id is None:
        raise ValueError("--pad-prompts needs a tokenizer with a padding token, got none")
    return block_length if wanted else None


def prompt_ids(
    tokenizer: Any, messages: Messages, *, raw: bool = False, pad_to: int | None = None
) -> tuple[list[int], str]:
    """The token ids of a prompt, and the text that they encode.

    With a chat template (unless `raw`), the template writes the special tokens. Without one there
    must be a single message, and the tokenizer adds its special tokens as it does to any text, such
    as Llama's <s> at the start. An end-of-sequence token at the end is removed, since the answer
    comes there. With `pad_to`, such a prompt is then padded on the left to a multiple of it: the
    demo's models were trained with prompts that fill whole blocks.
    """
    if not messages:
        raise ValueError("the answer must follow a message, got no message before it")
    if has_chat_template(tokenizer) and not raw:
        text = render(tokenizer, messages, answer_follows=True)
        return text_ids(tokenizer, text), text
    if len(messages) > 1:
        raise ValueError(
            "messages must be one prompt and one response where the tokenizer has no chat "
            f"template, got {len(messages)} messages before the response"
        )
    text = messages[0]["content"]
    bare = text_ids(tokenizer, text)
    ids = list(tokenizer(text)["input_ids"])
    if bare and ids[-1] == tokenizer.eos_token_id and ids[-len(bare) :] != bare:
        del ids[-1]
    if pad_to is not None:
        ids = [tokenizer.pad_token_id] * (-len(ids) % pad_to) + ids
    return ids, text


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """The token ids of the text, without special tokens.

    JSON can spell half of a surrogate pair ("\\ud83d", half an emoji). UTF-8 cannot encode it, and
    fast tokenizers raise a TypeError.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])
        raise ValueError(
            f"text must be Unicode characters, got half of a surrogate pair, {half}"
        ) from None
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
