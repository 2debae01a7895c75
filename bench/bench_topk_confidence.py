"""topk_confidence against softmax then topk."""

import torch

import dmax_kernels
from bench.cases import DTYPES, Case, Work, benchmark_of, flat_logits


def build(dtype, k):
    logits = flat_logits(32, DTYPES[dtype])
    return Work(
        {
            "eager": lambda: torch.softmax(logits, dim=-1).topk(k, dim=-1),
            "fused": lambda: dmax_kernels.topk_confidence(logits, k),
        },
        read=logits,
    )


CASES = [
    Case(f"topk_confidence 32 x 157184 {dtype} k={k}", lambda d=dtype, k=k: build(d, k))
    for dtype in DTYPES
    for k in (3, 8)
]

test_benchmark = benchmark_of(CASES)
