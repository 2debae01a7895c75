"""top1_confidence against softmax then max, the eager way to a token and its confidence."""

import torch

import dmax_kernels
from bench.cases import DTYPES, LOGITS, Case, Work, benchmark_of


def eager(logits):
    confidence, token = torch.softmax(logits, dim=-1).max(dim=-1)
    return token, confidence


def build(rows, dtype, kind):
    logits = LOGITS[kind](rows, DTYPES[dtype])
    return Work(
        {"eager": lambda: eager(logits), "fused": lambda: dmax_kernels.top1_confidence(logits)},
        read=logits,
    )


# One row (threads share the vocabulary), a block, and enough rows to leave every cache
CASES = [
    Case(
        f"top1_confidence {rows} x 157184 {dtype} {kind}",
        lambda rows=rows, dtype=dtype, kind=kind: build(rows, dtype, kind),
        target={"float32": 8.0, "bfloat16": 25.0}[dtype] if rows == 32 else None,
        bandwidth_target=0.8 if rows == 32 and kind == "peaked" else None,
    )
    for rows in (1, 32, 256)
    for dtype in DTYPES
    for kind in LOGITS
    if not (rows == 256 and dtype == "float32")
]

test_benchmark = benchmark_of(CASES)
