"""oput_loss, forward and backward of both passes, against eager cross-entropy."""

from bench.cases import Case, benchmark_of

CASES = [
    Case("oput_loss", (64, 157184), dtype, speedup_target=2) for dtype in ("float32", "bfloat16")
] + [Case("oput_loss_and_grad_", (64, 157184))]
GPU_CASES = [
    Case("oput_loss", (4096, 157184), target_us=1700.0, compiled=True),
    Case("oput_loss_and_grad_", (4096, 157184), target_us=1200.0, predicted_us=1250.0),
]

test_benchmark = benchmark_of(CASES)
