"""sample_tokens against softmax and an exponential race, and beside top1_confidence."""

from bench.cases import Case, benchmark_of

CASES = [
    Case("sample_tokens", (32, 157184), dtype, values)
    for dtype in ("float32", "bfloat16")
    for values in ("flat", "peaked")
]
GPU_CASES = [
    Case("sample_tokens", (32, 157184), predicted_us=9.0, compiled=True),
    Case("sample_tokens", (1024, 157184)),
]

test_benchmark = benchmark_of(CASES)
