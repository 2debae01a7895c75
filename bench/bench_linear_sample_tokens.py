"""linear_sample_tokens against the product followed by sample_tokens, and an eager sample."""

from bench.cases import Case, benchmark_of

CASES = [Case("linear_sample_tokens", (32, 2048, 157184), d) for d in ("float32", "bfloat16")]
GPU_CASES = [
    Case("linear_sample_tokens", (rows, 2048, 157184)) for rows in (1, 32, 64, 256, 1024, 4096)
]

test_benchmark = benchmark_of(CASES)
