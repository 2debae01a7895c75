"""Workloads of drawing a token per row of logits, and of the filters before a draw."""

from __future__ import annotations

from typing import Any

import torch

import dmax_kernels
from dmax_kernels import reference
from dmax_kernels.bench.workload import VOCAB, Inputs, Work, workload


@workload
def sample_tokens(inputs: Inputs, rows: int = 32, vocab: int = VOCAB) -> Work:
    """Softmax in float32, then an exponential race: what engines run for a sample."""
    logits, seed = inputs.logits(rows, vocab), inputs.seed()
    return Work(
        {
            "eager": lambda: exponential_race(logits),
            "fused": lambda: dmax_kernels.sample_tokens(logits, seed),
            "top1_confidence": lambda: dmax_kernels.top1_confidence(logits),
        },
        logits.nbytes,
        given={"logits": logits},
    )


def exponential_race(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    probability = torch.softmax(logits.float(), dim=-1)
    token = (probability / torch.empty_like(probability).exponential_()).argmax(-1, True)
    return token, probability.gather(-1, token)


def filtered_draw(inputs: Inputs, rows: int, vocab: int, **options: Any) -> Work:
    """Eager sorts the row, as transformers' logits processors and vLLM's sampler do."""
    logits, seed = inputs.logits(rows, vocab), inputs.seed()
    return Work(
        {
            "eager": lambda: exponential_race(sorted_and_masked(logits.float(), **options)),
            "fused": lambda: dmax_kernels.sample_tokens(logits, seed, **options),
            "top1_confidence": lambda: dmax_kernels.top1_confidence(logits),
        },
        logits.nbytes,
        given={"logits": logits, "options": options},
    )


def sorted_and_masked(
    x: torch.Tensor, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> torch.Tensor:
    """The logits, -inf at tokens that the filters drop."""
    if top_k:
        least = torch.topk(x, min(top_k, x.shape[-1])).values[..., -1:]
        x = x.masked_fill(x < least, -torch.inf)
    if top_p < 1:
        _, order, dropped = top_p_dropped(x, top_p)
        x = x.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), -torch.inf)
    if min_p > 0:
        probability = torch.softmax(x, dim=-1)
        x = x.masked_fill(probability < min_p * probability.amax(-1, keepdim=True), -torch.inf)
    return x


def top_p_dropped(x: torch.Tensor, top_p: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The logits in descending order, their ids, and whether each is beyond the share top_p."""
    ordered, order = x.sort(dim=-1, descending=True, stable=True)
    probability = torch.softmax(ordered, dim=-1)
    return ordered, order, probability.cumsum(dim=-1) - probability >= top_p


@workload
def top_p_cut(inputs: Inputs, rows: int = 32, vocab: int = VOCAB) -> Work:
    """Where nine tenths of the mass end."""
    logits = inputs.logits(rows, vocab)

    def eager() -> tuple[torch.Tensor, torch.Tensor]:
        ordered, order, dropped = top_p_dropped(logits.float(), 0.9)
        last = (~dropped).sum(dim=-1, keepdim=True) - 1
        return ordered.gather(-1, last).squeeze(-1), order.gather(-1, last).squeeze(-1)

    return Work(
        {"eager": eager, "fused": lambda: dmax_kernels.top_p_cut(logits, 0.9)},
        logits.nbytes,
        given={"logits": logits},
    )


@workload
def sample_top_k(inputs: Inputs, rows: int = 32, vocab: int = VOCAB) -> Work:
    """A draw from the 50 most probable tokens."""
    return filtered_draw(inputs, rows, vocab, top_k=50)


@workload
def sample_top_p(inputs: Inputs, rows: int = 32, vocab: int = VOCAB) -> Work:
    """A draw from nine tenths of the mass: on flat rows thousands of tokens, on peaked ones one."""
    return filtered_draw(inputs, rows, vocab, top_p=0.9)


@workload
def sample_top_k_top_p(inputs: Inputs, rows: int = 32, vocab: int = VOCAB) -> Work:
    """A draw with the two filters that engines' fused samplers have."""
    return filtered_draw(inputs, rows, vocab, top_k=50, top_p=0.9)


@workload
def sample_filtered(inputs: Inputs, rows: int = 32, vocab: int = VOCAB) -> Work:
    """A draw with every filter on."""
    return filtered_draw(inputs, rows, vocab, top_k=50, top_p=0.9, min_p=0.05)


def transformed(inputs: Inputs, rows: int, vocab: int, **everywhere: Any) -> Work:
    """A prompt and an output of 1,000 tokens each, which all rows share as a block's positions."""
    logits = inputs.logits(rows, vocab)
    counts = torch.bincount(inputs.ids(1000, below=vocab), minlength=vocab).int()
    words = torch.zeros(-(-vocab // 32), dtype=torch.int32, device=inputs.device)
    words[inputs.ids(1000, below=len(words))] = 1
    options = {
        "output_counts": counts, "prompt_tokens": words, "repetition_penalty": 1.1,
        "presence_penalty": 0.5, "frequency_penalty": 0.1, **everywhere,
    }  # fmt: skip
    start = logits.clone()
    return Work(
        {
            "eager": lambda: reference.transform_logits_(logits, **options),
            "fused": lambda: dmax_kernels.transform_logits_(logits, **options),
        },
        2 * logits.nbytes if everywhere else counts.nbytes + words.nbytes,
        restore=lambda: logits.copy_(start),
        given={"logits": logits, "options": options},
        writes=bool(everywhere),
    )


@workload
def penalties(inputs: Inputs, rows: int = 32, vocab: int = VOCAB) -> Work:
    """Repetition, presence and frequency penalties alone: few logits are touched."""
    return transformed(inputs, rows, vocab)


@workload
def transform_logits_(inputs: Inputs, rows: int = 32, vocab: int = VOCAB) -> Work:
    """Soft cap, bias and penalties: every logit is read and written."""
    bias = torch.zeros(vocab, device=inputs.device)
    return transformed(inputs, rows, vocab, softcap=30.0, bias=bias)
