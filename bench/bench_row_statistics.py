"""row_statistics against softmax, its two largest, its entropy, and logsumexp."""

import torch

import dmax_kernels
from bench.cases import DTYPES, LOGITS, Case, Work, benchmark_of


def eager(logits):
    x = logits.float()  # an entropy summed in 16 bits would be noise
    probability = torch.softmax(x, dim=-1)
    (confidence, runner_up), token = (each.unbind(-1) for each in probability.topk(2))
    entropy = torch.special.entr(probability).sum(dim=-1)
    return token[0], confidence, runner_up, entropy, torch.logsumexp(x, dim=-1)


def build(rows, dtype, kind):
    logits = LOGITS[kind](rows, DTYPES[dtype])
    return Work(
        {
            "eager": lambda: eager(logits),
            "fused": lambda: dmax_kernels.row_statistics(logits),
            "top1_confidence": lambda: dmax_kernels.top1_confidence(logits),
        },
        read=logits,
    )


# One row (threads share the vocabulary) and a block
CASES = [
    Case(
        f"row_statistics {rows} x 157184 {dtype} {kind}",
        lambda rows=rows, dtype=dtype, kind=kind: build(rows, dtype, kind),
        candidates=("eager", "fused", "top1_confidence"),
    )
    for rows in (1, 32)
    for dtype in DTYPES
    for kind in LOGITS
]

test_benchmark = benchmark_of(CASES)
