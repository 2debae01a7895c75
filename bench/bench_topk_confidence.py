"""topk_confidence against softmax, then topk."""

from bench.cases import Case, benchmark_of

CASES = [
    Case("topk_confidence", (32, 157184, k), dtype)
    for dtype in ("float32", "bfloat16")
    for k in (3, 8)
]
GPU_CASES = [Case("topk_confidence", (32, 157184, 4))]

test_benchmark = benchmark_of(CASES)
