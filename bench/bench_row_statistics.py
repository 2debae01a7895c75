"""row_statistics against softmax, its two largest, its entropy, and logsumexp."""

from bench.cases import Case, benchmark_of

# One row (threads share the vocabulary), and a block
CASES = [
    Case("row_statistics", (rows, 157184), dtype, values)
    for rows in (1, 32)
    for dtype in ("float32", "bfloat16")
    for values in ("flat", "peaked")
]
# Predicted as top1_confidence: the same bytes
GPU_CASES = [
    Case("row_statistics", (32, 157184), predicted_us=6.0, compiled=True),
    Case("row_statistics", (4096, 157184), predicted_us=310.0, compiled=True),
]

test_benchmark = benchmark_of(CASES)
