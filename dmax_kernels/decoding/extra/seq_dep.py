"""How sequential a text is: NAP's Sequential Dependence (arXiv 2602.23225, section 3.3, Eq. 4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from dmax_kernels._checks import read_integer, require
from dmax_kernels.ops.target_logprobs import target_logprobs

IGNORE = -100


@dataclass(frozen=True)
class SeqDep:
    """The terms of Eq. 4, for segments 2 ... N: log-probabilities in nats, summed over a segment's
    tokens.

    Attributes:
        with_prefix: log p(s_n | x, s_<n).
        alone: log p(s_n | x).
    """

    with_prefix: list[float]
    alone: list[float]

    @property
    def gains(self) -> list[float]:
        """What each segment gains by the segments before it."""
        return [a - b for a, b in zip(self.with_prefix, self.alone, strict=True)]

    @property
    def value(self) -> float:
        """SeqDep(x, s): the mean gain."""
        return sum(self.gains) / len(self.gains)


@torch.no_grad()
def seq_dep(
    model: Any,
    prompt: Sequence[int],
    segments: Sequence[Sequence[int]],
    *,
    batch_size: int = 8,
) -> SeqDep:
    """Sequential Dependence of a text that is divided into segments (Eq. 4)::

        SeqDep(x, s) = 1/(N - 1) sum_{n = 2}^{N} ( log p(s_n | x, s_<n) - log p(s_n | x) )

    Near 0, the segments are independent given the prompt and could be generated in parallel. How to
    divide a text (paragraphs, sentences, the paths of a canvas) is the caller's choice, and values
    compare only under one division: a longer segment has larger terms.

    Args:
        model: an autoregressive model of transformers, which scores the text: logits at a position
            predict the next token. It should be in evaluation mode.
        prompt: token ids of x, at least one (the beginning-of-sequence token where there is no
            prompt).
        segments: token ids of s_1 ... s_N, at least two segments of at least one token.
        batch_size: segments that are scored alone in one forward pass.

    Raises:
        ValueError: an empty prompt or segment, fewer than two segments, a token outside the model's
            vocabulary, or a text longer than the model's context.
    """
    size = read_integer("seq_dep: batch_size", batch_size, "a positive integer")
    x = [int(token) for token in prompt]
    parts = [[int(token) for token in segment] for segment in segments]
    require(len(x) > 0, "seq_dep: prompt", "at least one token", "none")
    require(len(parts) > 1, "seq_dep: segments", "at least two", len(parts))
    empty = next((number for number, part in enumerate(parts, 1) if not part), None)
    need = "of at least one token each"
    require(empty is None, "seq_dep: segments", need, f"none in segment {empty}")
    whole = [*x, *(token for part in parts for token in part)]
    check_ids(model, whole)

    scores = token_scores(model, [whole])[0]
    ends = torch.tensor([len(x), *map(len, parts)]).cumsum(0).tolist()
    with_prefix = [float(scores[a - 1 : b - 1].sum()) for a, b in pairwise(ends[1:])]
    alone: list[float] = []
    for begin in range(1, len(parts), size):
        rows = [[*x, *part] for part in parts[begin : begin + size]]
        scored = token_scores(model, rows)
        alone += [float(row[len(x) - 1 :].sum()) for row in scored]
    return SeqDep(with_prefix, alone)


def token_scores(model: Any, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """log p(token | the tokens before it) of every token after the first, float64, for each row."""
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(rows):  # padded on the right, where no token looks
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
    target = ids.masked_fill(mask == 0, IGNORE)[:, 1:]
    device = model.get_input_embeddings().weight.device
    logits = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits[:, :-1]
    scores = target_logprobs(logits, target.to(logits.device)).logprob.double().cpu()
    return [row[: len(tokens) - 1] for row, tokens in zip(scores, rows, strict=True)]


def check_ids(model: Any, ids: Sequence[int]) -> None:
    vocabulary = model.get_input_embeddings().weight.shape[0]
    outside = next((token for token in ids if not 0 <= token < vocabulary), None)
    need = f"token ids in [0, {vocabulary}), the model's vocabulary"
    require(outside is None, "seq_dep: prompt and segments", need, outside)
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None:
        need = f"at most {context} tokens together, the model's context"
        require(len(ids) <= context, "seq_dep: prompt and segments", need, len(ids))
