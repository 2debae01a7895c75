"""Workloads of the ops that read rows of logits."""

from __future__ import annotations

import torch

import dmax_kernels
from dmax_kernels import reference
from dmax_kernels.bench.workload import VOCAB, Inputs, Work, workload


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
def row_statistics(inputs: Inputs, rows: int = 32, vocab: int = VOCAB) -> Work:
    """Softmax in float32, its two largest, its entropy, and logsumexp: four reads or more."""
    logits = inputs.logits(rows, vocab)

    def eager():
        x = logits.float()  # an entropy summed in 16 bits would be noise
        probability = torch.softmax(x, dim=-1)
        top, token = probability.topk(2, dim=-1)
        entropy = torch.special.entr(probability).sum(dim=-1)
        return token[..., 0], top[..., 0], top[..., 1], entropy, torch.logsumexp(x, dim=-1)

    return Work(
        {
            "eager": eager,
            "fused": lambda: dmax_kernels.row_statistics(logits),
            "top1_confidence": lambda: dmax_kernels.top1_confidence(logits),
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


def merged_shards(inputs: Inputs, rows: int, vocab: int, shards: int, run) -> Work:
    """run(backend, [(columns, first id)]) of every shard, as tensor-parallel ranks run them."""
    parts = inputs.logits(rows, vocab).chunk(shards, dim=-1)
    cut = [(part, i * parts[0].shape[-1]) for i, part in enumerate(parts)]
    return Work(
        {"eager": lambda: run(reference, cut), "fused": lambda: run(dmax_kernels, cut)},
        sum(part.nbytes for part in parts),
    )


def stack_columns(found: list[tuple[torch.Tensor, ...]]) -> list[torch.Tensor]:
    return [torch.stack(column) for column in zip(*found, strict=True)]


@workload
def top1_partial(inputs: Inputs, rows: int = 32, vocab: int = VOCAB, shards: int = 8) -> Work:
    """Every shard's top1_partial and their top1_merge."""

    def run(backend, cut):
        found = [backend.top1_partial(part, start) for part, start in cut]
        return backend.top1_merge(*stack_columns(found))

    return merged_shards(inputs, rows, vocab, shards, run)


@workload
def sample_partial(inputs: Inputs, rows: int = 32, vocab: int = VOCAB, shards: int = 8) -> Work:
    """Every shard's sample_partial and their sample_merge."""
    seed = inputs.seed()

    def run(backend, cut):
        found = [backend.sample_partial(part, seed, start) for part, start in cut]
        return backend.sample_merge(*stack_columns(found))

    return merged_shards(inputs, rows, vocab, shards, run)
