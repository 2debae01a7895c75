"""Which tokens end an answer: `train`, `generate` and `spd_generate` all ask here.

An answer ends at any of the tokens that these list (the union), in this order:

1. the tokenizer's `eos_token_id`, if there is a tokenizer (`spd_generate` has none),
2. `model.generation_config.eos_token_id`, from generation_config.json, where chat models list
   theirs and where transformers' own generate looks,
3. `model.config.eos_token_id`, from config.json,
4. what is known about the model's family (`pretrained.LLADA2`), whose config lists none.

The lists often differ: a fine-tuned chat model's tokenizer says <|im_end|> while its config still
says <|endoftext|>. Training cuts a response after its first token of the union, or else appends the
first id in the order above. It writes the union into the checkpoint, where `spd_generate` finds it.
An id that the caller gives (`--eos-token-id`, `spd_generate(eos_token_id=...)`) replaces the union.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def as_ids(value: int | Iterable[int] | None) -> tuple[int, ...]:
    """The ids in an `eos_token_id`, which configs and callers write as None, one id or several."""
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)


def end_token_ids(
    model: Any, tokenizer: Any = None, known: int | Iterable[int] | None = None
) -> tuple[int, ...]:
    """The union above, with each id once; `known` are the ids of the model's family."""
    named = [
        getattr(source, "eos_token_id", None)
        for source in (tokenizer, getattr(model, "generation_config", None), model.config)
    ]
    return tuple(dict.fromkeys(i for value in (*named, known) for i in as_ids(value)))


def write_end_token_ids(model: Any, ids: tuple[int, ...]) -> None:
    """Writes the ids into the configs that are saved with the model."""
    for config in (model.config, getattr(model, "generation_config", None)):
        if config is not None and set(as_ids(getattr(config, "eos_token_id", None))) != set(ids):
            config.eos_token_id = list(ids) if len(ids) > 1 else ids[0]
