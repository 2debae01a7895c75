"""Prompts of different lengths: read from padded batches or lists, checked against the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dmax_kernels.decoding.settings import require


def read_prompts(
    input_ids: Tensor | Sequence[Tensor | Sequence[int]], attention_mask: Tensor | None
) -> list[Tensor]:
    """Each row's prompt without its padding: int64 [T_r] on the CPU.

    input_ids: [B, T], padded on either side where attention_mask [B, T] is 0; or a list of prompts.
    """
    if isinstance(input_ids, Tensor):
        require(input_ids.dim() == 2, "input_ids", "2-D [B, T]", f"{input_ids.dim()}-D")
        check_integers(input_ids)
        rows = list(input_ids.cpu())
        if attention_mask is not None:
            rows = unpad(rows, input_ids.shape, attention_mask)
    else:
        require(
            attention_mask is None,
            "attention_mask",
            "None where input_ids is a list of prompts",
            "a mask",
        )
        rows = [torch.as_tensor(row).cpu() for row in input_ids]
        for row in rows:
            require(row.dim() == 1, "each prompt", "1-D", f"{row.dim()}-D")
            if row.numel() > 0:  # an empty list has no dtype to speak of
                check_integers(row)
    require(len(rows) > 0, "input_ids", "at least one row", "0 rows")
    for index, row in enumerate(rows):
        got = f"an empty prompt (row {index})"
        require(len(row) > 0, "input_ids", "at least one prompt token per row", got)
    return [row.long() for row in rows]


def unpad(rows: Sequence[Tensor], shape: torch.Size, attention_mask: Tensor) -> list[Tensor]:
    require(
        attention_mask.shape == shape,
        "attention_mask",
        f"{list(shape)} as input_ids",
        list(attention_mask.shape),
    )
    kept = []
    for index, (row, mask) in enumerate(zip(rows, attention_mask.cpu() != 0, strict=True)):
        places = torch.nonzero(mask).flatten()
        one_run = len(places) == 0 or places[-1] - places[0] + 1 == len(places)
        require(bool(one_run), "attention_mask", "one run of ones per row", f"a gap in row {index}")
        kept.append(row[mask])
    return kept


def check_integers(ids: Tensor) -> None:
    is_integer = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
    require(is_integer, "input_ids", "integer token ids", ids.dtype)


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
