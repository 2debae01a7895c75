"""Prompts of different lengths: read from padded batches or lists, checked against the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dmax_kernels.decoding.settings import require

Rows = Tensor | Sequence[Tensor | Sequence[int]]
Prompts = Rows | Mapping[str, Any]


def unwrap(input_ids: Prompts, attention_mask: Rows | None) -> tuple[Rows, Rows | None]:
    """The token ids and the mask of a tokenizer's mapping; anything else as it is.

    The mapping's own attention mask counts unless another one is given.
    """
    if not isinstance(input_ids, Mapping):
        return input_ids, attention_mask
    require("input_ids" in input_ids, "input_ids", "a mapping with 'input_ids'", list(input_ids))
    if attention_mask is None:
        attention_mask = input_ids.get("attention_mask")
    return input_ids["input_ids"], attention_mask


def read_prompts(input_ids: Rows, attention_mask: Rows | None) -> list[Tensor]:
    """Each row's prompt without its padding: int64 [T_r] on the CPU.

    input_ids: [B, T], or a list of prompts; padded on either side where attention_mask is 0, which
    is of the same shape, or a list of as many masks.
    """
    if isinstance(input_ids, Tensor):
        require(input_ids.dim() == 2, "input_ids", "2-D [B, T]", f"{input_ids.dim()}-D")
    rows = read_rows("input_ids", "integer token ids", input_ids)
    if attention_mask is not None:
        rows = unpad(rows, read_rows("attention_mask", "zeros and ones", attention_mask))
    require(len(rows) > 0, "input_ids", "at least one row", "0 rows")
    for index, row in enumerate(rows):
        got = f"an empty prompt (row {index})"
        require(len(row) > 0, "input_ids", "at least one prompt token per row", got)
    for row in rows:
        is_integer = not (row.is_floating_point() or row.is_complex() or row.dtype == torch.bool)
        require(is_integer, "input_ids", "integer token ids", row.dtype)
    return [row.long() for row in rows]


def read_rows(argument: str, content: str, rows: Rows) -> list[Tensor]:
    """Each row of a [B, T] tensor or a list of rows, on the CPU."""
    need = f"{content}: a tensor [B, T] or a list of rows"
    is_rows = isinstance(rows, Sequence) or hasattr(rows, "__array__")  # not a set, not a string
    require(is_rows and not isinstance(rows, str), argument, need, type(rows).__name__)
    tensors = []
    for row in rows.cpu() if isinstance(rows, Tensor) else rows:
        try:
            tensor = torch.as_tensor(row).cpu()
        except (TypeError, ValueError, RuntimeError):
            require(False, argument, need, f"a row that is {type(row).__name__}")
        require(tensor.dim() == 1, f"each row of {argument}", "1-D", f"{tensor.dim()}-D")
        tensors.append(tensor)
    return tensors


def unpad(rows: list[Tensor], masks: list[Tensor]) -> list[Tensor]:
    lengths, got = [len(row) for row in rows], [len(mask) for mask in masks]
    require(lengths == got, "attention_mask", f"as long as input_ids, {lengths}", got)
    kept = []
    for index, (row, mask) in enumerate(zip(rows, masks, strict=True)):
        seen = mask != 0
        places = torch.nonzero(seen).flatten()
        one_run = len(places) == 0 or places[-1] - places[0] + 1 == len(places)
        require(bool(one_run), "attention_mask", "one run of ones per row", f"a gap in row {index}")
        kept.append(row[seen])
    return kept


def check_prompts(
    prompts: list[Tensor], vocabulary: int, config: Any, block_length: int, max_new_tokens: int
) -> None:
    """Every id in the vocabulary, and room for prompt and answer in the model's context."""
    in_vocabulary = f"in [0, {vocabulary}), the model's vocabulary"
    for prompt in prompts:
        lowest, highest = (int(bound) for bound in prompt.aminmax())
        require(lowest >= 0, "input_ids", in_vocabulary, lowest)
        require(highest < vocabulary, "input_ids", in_vocabulary, highest)
    longest = max(map(len, prompts))
    length = -(-(longest + max_new_tokens) // block_length) * block_length
    context = getattr(config, "max_position_embeddings", None)
    if context is not None and length > context:
        raise ValueError(
            f"spd_generate: a prompt of {longest} tokens and max_new_tokens={max_new_tokens} need "
            f"{length} positions in whole blocks of {block_length}, but the model's context is "
            f"{context} (config.max_position_embeddings)"
        )
