"""Workloads of the ops that read rows of logits."""

from __future__ import annotations

import torch

import dmax_kernels
from dmax_kernels import reference
from dmax_kernels.benchmark.workload import VOCAB, Inputs, Work, workload


@workload
def top1_confidence(inputs: Inputs, rows: int = 32, vocab: int = VOCAB) -> Work:
    """Softmax, then max: the eager way to a token and its confidence."""
    logits = inputs.logits(rows, vocab)
    return Work(
        {
            "eager": lambda: torch.softmax(logits, dim=-1).max(dim=-1),
            "fused": lambda: dmax_kernels.top1_confidence(logits),
        },
        logits.nbytes,
    )


@workload
def topk_confidence(inputs: Inputs, rows: int = 32, vocab: int = VOCAB, k: int = 4) -> Work:
    """Softmax, then topk."""
    logits = inputs.logits(rows, vocab)
    return Work(
        {
            "eager": lambda: torch.softmax(logits, dim=-1).topk(k, dim=-1),
            "fused": lambda: dmax_kernels.topk_confidence(logits, k),
        },
        logits.nbytes,
    )


@workload
def sample_tokens(inputs: Inputs, rows: int = 32, vocab: int = VOCAB) -> Work:
    """Softmax in float32, then an exponential race: what engines run for a sample."""
    logits, seed = inputs.logits(rows, vocab), inputs.seed()

    def eager():
        probability = torch.softmax(logits.float(), dim=-1)
        token = (probability / torch.empty_like(probability).exponential_()).argmax(-1, True)
        return token, probability.gather(-1, token)

    return Work(
        {
            "eager": eager,
            "fused": lambda: dmax_kernels.sample_tokens(logits, seed),
            "top1_confidence": lambda: dmax_kernels.top1_confidence(logits),
        },
        logits.nbytes,
    )


@workload
def top1_partial(inputs: Inputs, rows: int = 32, vocab: int = VOCAB, shards: int = 8) -> Work:
    """Every shard's top1_partial and their top1_merge, as tensor-parallel ranks run them."""
    parts = inputs.logits(rows, vocab).chunk(shards, dim=-1)
    width = parts[0].shape[-1]

    def run(backend):
        found = [backend.top1_partial(part, i * width) for i, part in enumerate(parts)]
        return backend.top1_merge(*(torch.stack(column) for column in zip(*found, strict=True)))

    return Work(
        {"eager": lambda: run(reference), "fused": lambda: run(dmax_kernels)},
        sum(part.nbytes for part in parts),
    )
