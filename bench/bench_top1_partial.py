"""top1_partial over 8 shards and top1_merge, as tensor-parallel ranks would run them."""

from bench.cases import Case, benchmark_of

CASES = [Case("top1_partial", (32, 157184, 8), dtype) for dtype in ("float32", "bfloat16")]
GPU_CASES = [Case("top1_partial", (32, 157184, 8))]

test_benchmark = benchmark_of(CASES)
