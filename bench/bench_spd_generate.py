"""The decoding loop on plain PyTorch and on the kernels, with the small model that ships here."""

from bench.cases import Case, benchmark_of

CASES = [Case("spd_generate", (8, 96), "float32")]

test_benchmark = benchmark_of(CASES)
