"""The two ways of Triton's linear_top1_confidence, as candidates in the GPU cases.

Their times set LEAST_CHUNKED_ROWS in dmax_kernels/triton/linear_rows.py. The whole
product followed by top1_confidence, a candidate of the workload, is the bar for both.
"""

from __future__ import annotations

from collections.abc import Sequence

from dmax_kernels.bench.workload import Work

FUSED, CHUNKED = "one kernel", "products of chunks"


def add_linear_ways(work: Work) -> None:
    from dmax_kernels.triton import IMPLEMENTATIONS
    from dmax_kernels.triton.linear_rows import LEAST_CHUNKED_ROWS

    op, hidden, weight = IMPLEMENTATIONS["linear_top1_confidence"], *work.given.values()

    def run(least: int | None):
        before = LEAST_CHUNKED_ROWS[hidden.dtype]
        LEAST_CHUNKED_ROWS[hidden.dtype] = least
        try:
            return op(hidden, weight)
        finally:
            LEAST_CHUNKED_ROWS[hidden.dtype] = before

    work.candidates[FUSED] = lambda: run(None)
    work.candidates[CHUNKED] = lambda: run(1)


def least_chunked_rows(results: Sequence[dict], dtype: str) -> int | None:
    """Smallest row count at and above which chunks were always faster; None if they were not faster
    even at the largest."""
    least = None
    rows = [row for row in results if CHUNKED in row.get("candidates", ()) and dtype in row["case"]]
    for row in sorted(rows, key=lambda row: -row["sizes"][0]):
        candidates = row["candidates"]
        if FUSED not in candidates or candidates[CHUNKED]["us"] >= candidates[FUSED]["us"]:
            break
        least = row["sizes"][0]
    return least
