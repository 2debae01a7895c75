"""The two ways of Triton's linear_top1_confidence and linear_sample_tokens, as candidates in the
GPU cases.

Their times set the tables in dmax_kernels/triton/linear_rows.py. The whole product followed by the
op on logits, a candidate of the workload, is the bar for both.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dmax_kernels.bench.workload import Work

FUSED, CHUNKED = "one kernel", "products of chunks"
WORKLOADS = ("linear_top1_confidence", "linear_sample_tokens")


def add_linear_ways(work: Work, workload: str) -> None:
    from dmax_kernels.triton import IMPLEMENTATIONS, linear_rows

    op, arguments = IMPLEMENTATIONS[workload], list(work.given.values())
    if workload == "linear_sample_tokens":
        arguments.append(torch.tensor([1, 2], device=arguments[0].device))  # the seed
    table = {
        "linear_top1_confidence": linear_rows.LEAST_CHUNKED_ROWS,
        "linear_sample_tokens": linear_rows.LEAST_CHUNKED_ROWS_SAMPLING,
    }[workload]
    dtype = arguments[0].dtype

    def run(least: int | None):
        before = table[dtype]
        table[dtype] = least
        try:
            return op(*arguments)
        finally:
            table[dtype] = before

    work.candidates[FUSED] = lambda: run(None)
    work.candidates[CHUNKED] = lambda: run(1)


def least_chunked_rows(results: Sequence[dict], workload: str, dtype: str) -> int | None:
    """Smallest row count at and above which chunks were always faster; None if they were not faster
    even at the largest."""
    least = None
    rows = [
        row for row in results
        if CHUNKED in row.get("candidates", ()) and row["op"] == workload and dtype in row["case"]
    ]  # fmt: skip
    for row in sorted(rows, key=lambda row: -row["sizes"][0]):
        candidates = row["candidates"]
        if FUSED not in candidates or candidates[CHUNKED]["us"] >= candidates[FUSED]["us"]:
            break
        least = row["sizes"][0]
    return least
