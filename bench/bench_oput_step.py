"""A training step on plain PyTorch and on the kernels, with the small model that ships here."""

from bench.cases import Case, benchmark_of

CASES = [Case("oput_step", (8,), "float32")]

test_benchmark = benchmark_of(CASES)
