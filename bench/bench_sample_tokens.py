"""sample_tokens against softmax then multinomial, and beside top1_confidence."""

import torch

import dmax_kernels
from bench.cases import DTYPES, LOGITS, Case, Work, benchmark_of


def eager(logits):
    probability = torch.softmax(logits.float(), dim=-1)
    token = torch.multinomial(probability, 1)
    return token, probability.gather(-1, token)


def build(dtype, kind):
    logits = LOGITS[kind](32, DTYPES[dtype])
    seed = torch.tensor([1, 2])
    return Work(
        {
            "eager": lambda: eager(logits),
            "fused": lambda: dmax_kernels.sample_tokens(logits, seed),
            "top1_confidence": lambda: dmax_kernels.top1_confidence(logits),
        },
        read=logits,
    )


CASES = [
    Case(
        f"sample_tokens 32 x 157184 {dtype} {kind}",
        lambda d=dtype, k=kind: build(d, k),
        candidates=("eager", "fused", "top1_confidence"),
    )
    for dtype in DTYPES
    for kind in LOGITS
]

test_benchmark = benchmark_of(CASES)
