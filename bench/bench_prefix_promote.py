"""prefix_promote against its eager reference: the same eight small ops that engines run today."""

from bench.cases import Case, benchmark_of

CASES = [Case("prefix_promote", (blocks, 32)) for blocks in (1, 1024)]
GPU_CASES = [Case("prefix_promote", (16, 32), target_us=2.5)]

test_benchmark = benchmark_of(CASES)
