"""Workloads of the ops fused with the LM head.

The products in front are in the inputs' dtype over the whole vocabulary and so round 16-bit logits;
ours keep them in float32.
"""

from __future__ import annotations

import torch

import dmax_kernels
from dmax_kernels.bench.workload import DIM, VOCAB, Inputs, Work, workload


@workload
def linear_top1_confidence(
    inputs: Inputs, rows: int = 32, dim: int = DIM, vocab: int = VOCAB
) -> Work:
    """The head's product, then softmax and max; and the product, then our top1_confidence."""
    hidden, weight = inputs.normal(rows, dim), inputs.normal(vocab, dim, scale=dim**-0.5)
    return Work(
        {
            "eager": lambda: torch.softmax((hidden @ weight.t()).float(), dim=-1).max(dim=-1),
            "product, then top1_confidence": lambda: dmax_kernels.top1_confidence(
                hidden @ weight.t()
            ),
            "fused": lambda: dmax_kernels.linear_top1_confidence(hidden, weight),
        },
        hidden.nbytes + weight.nbytes,
        2 * rows * dim * vocab,
        inputs.dtype,
    )


@workload
def linear_sample_tokens(
    inputs: Inputs, rows: int = 32, dim: int = DIM, vocab: int = VOCAB
) -> Work:
    """The head's product, then a sample."""
    hidden, weight = inputs.normal(rows, dim), inputs.normal(vocab, dim, scale=dim**-0.5)
    seed = inputs.seed()

    def eager():
        probability = torch.softmax((hidden @ weight.t()).float(), dim=-1)
        token = (probability / torch.empty_like(probability).exponential_()).argmax(-1, True)
        return token, probability.gather(-1, token)

    return Work(
        {
            "eager": eager,
            "product, then sample_tokens": lambda: dmax_kernels.sample_tokens(
                hidden @ weight.t(), seed
            ),
            "fused": lambda: dmax_kernels.linear_sample_tokens(hidden, weight, seed),
        },
        hidden.nbytes + weight.nbytes,
        2 * rows * dim * vocab,
        inputs.dtype,
    )
