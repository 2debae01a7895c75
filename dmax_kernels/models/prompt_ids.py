"""From messages to token ids: the one way of `train` and `generate`, which must agree."""

from __future__ import annotations

from typing import Any

Messages = list[dict[str, str]]


def has_chat_template(tokenizer: Any) -> bool:
    return bool(getattr(tokenizer, "chat_template", None))


def render(tokenizer: Any, messages: Messages, *, answer_follows: bool) -> str:
    """The chat template's text of the messages; a ValueError of one line where it refuses them."""
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=answer_follows
        )
    except ImportError:  # of jinja2: no fault of the messages
        raise
    except Exception as error:  # a template is a program: it may raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"the chat template refuses the messages ({reason})") from None


def prompt_ids(tokenizer: Any, messages: Messages, *, raw: bool = False) -> tuple[list[int], str]:
    """Token ids that an answer follows, and the text that they stand for.

    With a chat template (unless `raw`) the template writes the special tokens. Without one there
    must be one message, and the tokenizer adds its own as it does to any text, as Llama's <s> in
    front, but for an end-of-sequence token behind the text: the answer goes there.
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
    return ids, text


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of the text and nothing else.

    JSON can spell half a surrogate pair ("\\ud83d", half an emoji), which UTF-8 cannot hold and
    fast tokenizers answer with a TypeError.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])
        raise ValueError(
            f"text must be Unicode characters, got half of a surrogate pair, {half}"
        ) from None
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
