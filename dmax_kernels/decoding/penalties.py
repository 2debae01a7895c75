"""Bias and penalties of the live rows' logits, before the rule sees them.

Shapes: B rows, b of them live, K positions of a block, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dmax_kernels._checks import require
from dmax_kernels.decoding.config import PENALTIES, PENALTIES_OFF, RunConfig
from dmax_kernels.decoding.prompts import row_values
from dmax_kernels.decoding.state import LiveBlocks
from dmax_kernels.decoding.step import Rule
from dmax_kernels.vocabulary import pack_mask

BIAS = "spd_generate: logit_bias"


class Penalties:
    """Applies `transform_logits_` to a pass's logits, and keeps the counts of each row's output.

    A token of the output counts once it is final. Those of committed blocks are; in the live block
    the decoded ones are, if the rule keeps a token once it is decoded. Under a rule that revises,
    nothing in the live block counts: a token would otherwise have to be kept from penalising
    itself, and two equal ones would give way to each other in turn and never settle. With a count
    that stands still a revised block converges as without penalties.
    """

    def __init__(
        self,
        rule: Rule,
        prompts: list[Tensor],
        config: RunConfig,
        embedding: Tensor,
        bias: Tensor | None,
        penalties: dict[str, Tensor],
    ) -> None:
        """bias: float32 [V] or [B, V]; penalties: float32 [B] each, or none of them."""
        self.keeps = not rule.revise
        self.ends = config.eos_token_id
        self.transform_ = config.functions.transform_logits_
        self.shared: dict[str, Tensor] = {}  # one for all rows
        self.of_rows = dict(penalties)  # [B, ...] each: `LiveBlocks.penalties`
        if bias is not None:
            (self.shared if bias.dim() == 1 else self.of_rows)["bias"] = bias
        if penalties:
            shape = (len(prompts), len(embedding))
            self.of_rows["prompt_tokens"] = torch.stack(
                [pack_mask(prompt.bincount(minlength=shape[1]) > 0) for prompt in prompts]
            )
            # Of committed blocks
            self.of_rows["output_counts"] = torch.zeros(shape, dtype=torch.int32, device="cpu")
        for several in (self.shared, self.of_rows):
            several.update({name: each.to(embedding.device) for name, each in several.items()})

    def changed(self, logits: Tensor, state: LiveBlocks) -> Tensor:
        """The logits [b, K, V] with bias and penalties: a copy, as the model may keep its own.

        It is float32. In bfloat16 the logits from 16 to 32 lie 1/8 apart, and a smaller penalty
        would be rounded to that or to nothing. Nothing here waits for the device.
        """
        options = {**self.shared, **state.penalties}
        if self.keeps and "output_counts" in options:
            final = state.editable & ~state.masked
            ends = torch.zeros_like(final)
            for token in self.ends:  # a tensor of them could not be made inside a CUDA graph
                ends |= state.token == token
            final &= (final & ends).cumsum(dim=-1) == 0  # the answer goes no further
            counts = options["output_counts"]
            options["output_counts"] = counts.scatter_add(1, state.token, final.int())
            # What is decided stays, and its own count must not change how sure it looks
            for name, off in PENALTIES_OFF.items():
                options[name] = torch.where(state.masked, options[name].unsqueeze(-1), off)
        copy = logits.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        return self.transform_(copy, **options)

    def commit_(self, state: LiveBlocks, rows: Tensor) -> None:
        """Count the tokens of the blocks that end where rows, bool [b], is True."""
        if "output_counts" in state.penalties:
            new = state.editable & rows.unsqueeze(-1)
            state.penalties["output_counts"].scatter_add_(1, state.token, new.int())


def make_penalties(
    rule: Rule, prompts: list[Tensor], config: RunConfig, embedding: Tensor
) -> Penalties | None:
    """None where no option asks for any: the loop then does nothing more than without them."""
    rows, length = len(prompts), config.block_length
    bias = read_bias(config.logit_bias, rows, len(embedding))
    values = {name: row_values(config, name, rows) for name in PENALTIES}
    applied = [name for name, off in PENALTIES_OFF.items() if (values[name] != off).any()]
    if bias is None and not applied:
        return None
    reach = max(len(prompt) % length for prompt in prompts) + config.max_new_tokens
    for name in applied:
        require(
            name == "repetition_penalty" or not rule.revise or reach > length,
            f"spd_generate: {name}",
            "0 where a rule that revises decodes each answer in one block, since it counts the "
            "tokens of earlier blocks",
            getattr(config, name),
        )
    return Penalties(rule, prompts, config, embedding, bias, values if applied else {})


def read_bias(value: Any, rows: int, vocabulary: int) -> Tensor | None:
    """logit_bias, as a `DecodeConfig` holds it, as float32 [V] or [B, V] on the CPU."""
    if value is None:
        return None
    if isinstance(value, tuple):
        need = f"one for all, or one for each of the {rows} prompts"
        require(len(value) == rows, BIAS, need, f"{len(value)} of them")
        each = [read_bias(of_row, rows, vocabulary) for of_row in value]
        none = torch.zeros(vocabulary, dtype=torch.float32, device="cpu")
        given = any(bias is not None for bias in each)
        return torch.stack([none if bias is None else bias for bias in each]) if given else None
    if isinstance(value, Mapping):
        for token in value:
            need = f"of token ids in [0, {vocabulary}), the model's vocabulary"
            require(token < vocabulary, BIAS, need, token)
        bias = torch.zeros(vocabulary, dtype=torch.float32, device="cpu")
        bias[list(value)] = torch.tensor(list(value.values()), dtype=torch.float32, device="cpu")
        return bias
    fits = list(value.shape) in ([vocabulary], [rows, vocabulary])
    need = f"[{vocabulary}] or [{rows}, {vocabulary}] where it is a tensor"
    require(fits, BIAS, need, list(value.shape))
    # A copy: rows of the batch change places in it
    return value.to("cpu", torch.float32, copy=True, memory_format=torch.contiguous_format)
