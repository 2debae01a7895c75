"""linear_top1_confidence against the LM head's product followed by top1_confidence, and eager."""

from bench.cases import Case, benchmark_of

CASES = [
    Case("linear_top1_confidence", (rows, 2048, 157184), dtype, speedup_target=1)
    for rows in (32, 256)
    for dtype in ("float32", "bfloat16")
]
# Every row count of the dispatch: the fused op may be slower than the product at none of them
GPU_CASES = [
    Case(
        "linear_top1_confidence",
        (rows, 2048, 157184),
        target_us=150.0 if rows <= 64 else None,
        compiled=rows in (32, 4096),
    )
    for rows in (1, 16, 32, 64, 128, 256, 512, 1024, 4096, 8192)
]

test_benchmark = benchmark_of(CASES)
