"""What each row brings: its prompt, of any length, and perhaps options of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dmax_kernels._checks import require
from dmax_kernels.decoding.config import SAMPLING, RunConfig
from dmax_kernels.models.attention_window import attention_window

Rows = Tensor | Sequence[Tensor | Sequence[int]]
Prompts = Rows | Mapping[str, Any]

INPUT_IDS = "spd_generate: input_ids"
ATTENTION_MASK = "spd_generate: attention_mask"


def unwrap(input_ids: Prompts, attention_mask: Rows | None) -> tuple[Rows, Rows | None]:
    """The token ids and the mask of a tokenizer's mapping; anything else as it is.

    The mapping's own attention mask counts unless one is given.
    """
    if not isinstance(input_ids, Mapping):
        return input_ids, attention_mask
    require("input_ids" in input_ids, INPUT_IDS, "a mapping with 'input_ids'", list(input_ids))
    if attention_mask is None:
        attention_mask = input_ids.get("attention_mask")
    return input_ids["input_ids"], attention_mask


def read_prompts(input_ids: Rows, attention_mask: Rows | None) -> list[Tensor]:
    """Each row's prompt without its padding: int64 [T_r] on the CPU.

    input_ids: [B, T], or a list of prompts. A prompt is padded, on either side, where
    attention_mask is 0; that has the same shape, or is a list of as many masks.
    """
    if isinstance(input_ids, Tensor):
        require(input_ids.dim() == 2, INPUT_IDS, "2-D [B, T]", f"{input_ids.dim()}-D")
    rows = read_rows("input_ids", "integer token ids", input_ids)
    if attention_mask is not None:
        rows = unpad(rows, read_rows("attention_mask", "zeros and ones", attention_mask))
    require(len(rows) > 0, INPUT_IDS, "at least one row", "0 rows")
    for index, row in enumerate(rows):
        got = f"an empty prompt (row {index})"
        require(len(row) > 0, INPUT_IDS, "at least one prompt token per row", got)
    for row in rows:
        is_integer = not (row.is_floating_point() or row.is_complex() or row.dtype == torch.bool)
        require(is_integer, INPUT_IDS, "integer token ids", row.dtype)
    return [row.long() for row in rows]


def read_rows(argument: str, content: str, rows: Rows) -> list[Tensor]:
    """Each row of a [B, T] tensor or a list of rows, on the CPU."""
    what, need = f"spd_generate: {argument}", f"{content}: a tensor [B, T] or a list of rows"
    is_rows = isinstance(rows, Sequence) or hasattr(rows, "__array__")  # not a set, not a string
    require(is_rows and not isinstance(rows, str), what, need, type(rows).__name__)
    tensors = []
    for row in rows.cpu() if isinstance(rows, Tensor) else rows:
        try:
            tensor = torch.as_tensor(row, device="cpu")
        except (TypeError, ValueError, RuntimeError):
            require(False, what, need, f"a row that is {type(row).__name__}")
        dims = tensor.dim()
        require(dims == 1, f"spd_generate: each row of {argument}", "1-D", f"{dims}-D")
        tensors.append(tensor)
    return tensors


def unpad(rows: list[Tensor], masks: list[Tensor]) -> list[Tensor]:
    lengths, mask_lengths = [len(row) for row in rows], [len(mask) for mask in masks]
    need = f"as long as input_ids, {lengths}"
    require(lengths == mask_lengths, ATTENTION_MASK, need, mask_lengths)
    kept = []
    for index, (row, mask) in enumerate(zip(rows, masks, strict=True)):
        seen = mask != 0
        places = torch.nonzero(seen).flatten()
        one_run = len(places) == 0 or places[-1] - places[0] + 1 == len(places)
        require(bool(one_run), ATTENTION_MASK, "one run of ones per row", f"a gap in row {index}")
        kept.append(row[seen])
    return kept


def check_prompts(
    prompts: list[Tensor], vocabulary: int, model_config: Any, config: RunConfig
) -> None:
    """Every id in the vocabulary, and room for prompt and answer in the model's context."""
    in_vocabulary = f"in [0, {vocabulary}), the model's vocabulary"
    for prompt in prompts:
        lowest, highest = (int(bound) for bound in prompt.aminmax())
        require(lowest >= 0, INPUT_IDS, in_vocabulary, lowest)
        require(highest < vocabulary, INPUT_IDS, in_vocabulary, highest)
    longest = max(map(len, prompts))
    block = config.block_length
    length = -(-(longest + config.max_new_tokens) // block) * block
    needs = (
        f"spd_generate: a prompt of {longest} tokens and max_new_tokens={config.max_new_tokens} "
        f"need {length} positions in whole blocks of {block}, but"
    )
    context = getattr(model_config, "max_position_embeddings", None)
    if context is not None and length > context:
        raise ValueError(
            f"{needs} the model's context is {context} (config.max_position_embeddings)"
        )
    window = attention_window(model_config)
    if window is not None and length > window:
        raise ValueError(
            f"{needs} some of the model's layers attend to a window of {window} positions, which "
            "the mask of block-wise decoding does not have"
        )


def row_thresholds(
    thresholds: Tensor | Sequence[Sequence[float]] | None, config: RunConfig, rows: int
) -> Tensor:
    """float32 [B, 2] on the CPU: each row's (tau_dec, tau_acc)."""
    if thresholds is None:
        pair = torch.tensor([[config.tau_dec, config.tau_acc]], dtype=torch.float32, device="cpu")
        return pair.repeat(rows, 1)
    # A copy: rows of the batch change places in it
    table = torch.as_tensor(thresholds, dtype=torch.float32, device="cpu").clone()
    need = f"[{rows}, 2]: (tau_dec, tau_acc) of each row"
    argument = "spd_generate: thresholds"
    require(table.shape == (rows, 2), argument, need, list(table.shape))
    outside = table[~((table >= 0) & (table <= 1))]
    require(len(outside) == 0, argument, "in [0, 1]", next(iter(outside.tolist()), None))
    return table


def row_sampling(config: RunConfig, rows: int, device: torch.device) -> dict[str, Tensor]:
    """[B] each: the options of each row's samples by their fields; nothing if all are greedy."""
    sampling = {name: row_values(config, name, rows).to(device) for name in SAMPLING}
    return sampling if config.samples else {}


def row_values(config: RunConfig, name: str, rows: int) -> Tensor:
    """[B] on the CPU: each row's value of an option that is one number, or one per prompt."""
    value = getattr(config, name)
    if isinstance(value, tuple):
        need = f"a number, or one for each of the {rows} prompts"
        require(len(value) == rows, f"spd_generate: {name}", need, f"{len(value)} of them")
    dtype = torch.int64 if name == "seed" else torch.float32
    return torch.tensor(value, dtype=dtype, device="cpu").expand(rows).contiguous()
