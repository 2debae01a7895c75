"""The two ways of Triton's linear ops at every row count: the figures that set their dispatch.

``python bench/gpu_session.py bench`` runs this and prints, per dtype, the row count from which on
the products of chunks were faster: what LEAST_CHUNKED_ROWS in dmax_kernels/triton/linear_rows.py
should say. The whole product followed by top1_confidence is the bar that neither way may miss.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

import dmax_kernels
from dmax_kernels.bench.timer import captured, flush_buffer, timed
from dmax_kernels.bench.workload import DIM, DTYPES, VOCAB, Inputs

ROWS = {
    "bfloat16": (1, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192),
    "float32": (1, 16, 32, 64, 128, 256, 512, 1024),
}
FUSED, CHUNKED, PRODUCT = "fused kernel", "chunks", "product, then top1_confidence"


def run_linear_ways(repetitions: int = 30) -> list[dict]:
    from dmax_kernels.triton import IMPLEMENTATIONS
    from dmax_kernels.triton.linear_rows import LEAST_CHUNKED_ROWS

    op = IMPLEMENTATIONS["linear_top1_confidence"]
    flush = flush_buffer()
    found = []
    for name, counts in ROWS.items():
        dtype = DTYPES[name]
        before = LEAST_CHUNKED_ROWS[dtype]
        weight = Inputs(dtype, "cuda").normal(VOCAB, DIM, scale=DIM**-0.5)
        for rows in counts:
            hidden = Inputs(dtype, "cuda").normal(rows, DIM)
            times = {}
            for way, least in ((FUSED, None), (CHUNKED, 1)):
                LEAST_CHUNKED_ROWS[dtype] = least
                times[way] = microseconds(partial(op, hidden, weight), repetitions, flush)
            LEAST_CHUNKED_ROWS[dtype] = before
            times[PRODUCT] = microseconds(
                partial(product_then_top1, hidden, weight), repetitions, flush
            )
            found.append({"dtype": name, "rows": rows, "us": times, "faster": faster(times)})
            print(f"linear_top1_confidence {rows} {name}: {times}; faster: {faster(times)}")
        print(f"LEAST_CHUNKED_ROWS of {name}: {least_chunked_rows(found, name)}, now {before}")
        torch.cuda.empty_cache()
    return found


def product_then_top1(hidden, weight):
    return dmax_kernels.top1_confidence(hidden @ weight.t())


def microseconds(function, repetitions: int, flush: torch.Tensor) -> float:
    run, _ = captured(function)
    return timed(run, repetitions, flush=flush).microseconds


def faster(times: dict[str, float]) -> str:
    return min((FUSED, CHUNKED), key=times.__getitem__)


def least_chunked_rows(found: Sequence[dict], dtype: str) -> int | None:
    """The count from which on chunks were faster at all counts measured; None: at not even the
    largest."""
    least = None
    for row in reversed([each for each in found if each["dtype"] == dtype]):
        if row["faster"] != CHUNKED:
            break
        least = row["rows"]
    return least
