"""Which tokens end an answer: the one place that `train`, `generate` and `spd_generate` ask.

An answer ends at any of the tokens that these list, in this order:

1. the tokenizer's `eos_token_id`, where there is a tokenizer (`spd_generate` has none),
2. `model.generation_config.eos_token_id`, from generation_config.json: chat models list theirs
   there, and transformers' own generate stops at each,
3. `model.config.eos_token_id`, from config.json,
4. what is known of the model's family (`pretrained.LLADA2`), whose config lists none.

The lists often differ: a fine-tuned chat model's tokenizer says <|im_end|> while its config still
says <|endoftext|>. Training ends a response at the first token of the union, or adds the first id
in the order above, and writes the union into the checkpoint, where `spd_generate` finds it. An id
that is given (`--eos-token-id`, `spd_generate(eos_token_id=...)`) replaces the union.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def as_ids(value: int | Iterable[int] | None) -> tuple[int, ...]:
    """An `eos_token_id` as configs and callers write it: absent, one id, or several."""
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)


def end_token_ids(
    model: Any, tokenizer: Any = None, known: int | Iterable[int] | None = None
) -> tuple[int, ...]:
    """The union above, each id once. `known`: the family's."""
    named = [
        getattr(source, "eos_token_id", None)
        for source in (tokenizer, getattr(model, "generation_config", None), model.config)
    ]
    return tuple(dict.fromkeys(i for value in (*named, known) for i in as_ids(value)))


def write_end_token_ids(model: Any, ids: tuple[int, ...]) -> None:
    """Into the configs that are saved with the model."""
    for config in (model.config, getattr(model, "generation_config", None)):
        if config is not None and set(as_ids(getattr(config, "eos_token_id", None))) != set(ids):
            config.eos_token_id = list(ids) if len(ids) > 1 else ids[0]
