"""top1_confidence against softmax, then max."""

from bench.cases import Case, benchmark_of

ROWS = (32, 157184)

# One row (threads share the vocabulary), a block, and enough rows to leave every cache
CASES = [
    Case("top1_confidence", (1, 157184)),
    Case("top1_confidence", ROWS, "float32", "flat", speedup_target=8, compiled=True),
    Case("top1_confidence", ROWS, "float32", "peaked", speedup_target=8, bandwidth_target=0.8),
    Case("top1_confidence", ROWS, "bfloat16", "flat", speedup_target=25, compiled=True),
    Case("top1_confidence", ROWS, "bfloat16", "peaked", speedup_target=25, bandwidth_target=0.8),
    Case("top1_confidence", (256, 157184), "bfloat16", "flat"),
    Case("top1_confidence", (256, 157184), "bfloat16", "peaked", bandwidth_target=0.8),
]

GPU_CASES = [
    Case("top1_confidence", (1, 157184)),
    Case("top1_confidence", ROWS, target_us=6.0, predicted_us=6.0, compiled=True),
    Case("top1_confidence", ROWS, "float32"),
    Case("top1_confidence", (256, 157184), predicted_us=22.0),
    Case("top1_confidence", (1024, 157184), predicted_us=78.0),
    Case("top1_confidence", (4096, 157184), bandwidth_target=0.9, predicted_us=310.0,
         compiled=True),
]  # fmt: skip

test_benchmark = benchmark_of(CASES)
