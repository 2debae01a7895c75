"""hybrid_embedding, forward and with the table's gradient, against its eager reference."""

from bench.cases import Case, benchmark_of

CASES = [
    Case("hybrid_embedding", (32,)),
    Case("hybrid_embedding", (512,)),
    Case("hybrid_embedding", (512,), "float32"),
    Case("hybrid_embedding_backward", (512,), "float32"),
]
GPU_CASES = [
    Case("hybrid_embedding", (32,), target_us=3.0),
    Case("hybrid_embedding", (4096,)),
]

test_benchmark = benchmark_of(CASES)
