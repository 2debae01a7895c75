"""spd_step_ against the eager reference of the whole step, on a block in the middle of decoding."""

from bench.cases import Case, benchmark_of

CASES = [
    Case("spd_step_", (1, 32), dtype, values, speedup_target=8)
    for dtype in ("float32", "bfloat16")
    for values in ("flat", "peaked")
] + [Case("spd_step_", (4, 32), "bfloat16", "peaked")]
GPU_CASES = [
    Case("spd_step_", (1, 32), target_us=8.0, predicted_us=8.5),
    Case("spd_step_", (16, 32), target_us=45.0, predicted_us=46.0),
]

test_benchmark = benchmark_of(CASES)
