"""hybrid_embedding, forward and forward + backward, against its eager reference."""

import torch

import dmax_kernels
from bench.cases import DIM, DTYPES, MASK, VOCAB, Case, Work, benchmark_of
from dmax_kernels import reference


def build(rows, dtype, backward):
    generator = torch.manual_seed(0)
    vocab_size = 4096 if backward else VOCAB  # the dense gradient is the table's size for both
    embedding = torch.randn(vocab_size, DIM, generator=generator).to(DTYPES[dtype])
    embedding.requires_grad_(backward)
    token = torch.randint(0, vocab_size, (rows,), generator=generator)
    confidence = torch.rand(rows, generator=generator)
    masked = torch.rand(rows, generator=generator) < 0.3
    grad = torch.randn(rows, DIM, generator=generator).to(DTYPES[dtype])

    def run(op):
        hybrid = op(embedding, token, confidence, masked, min(MASK, vocab_size - 1))
        return torch.autograd.grad(hybrid, embedding, grad) if backward else hybrid

    return Work(
        {
            "eager": lambda: run(reference.hybrid_embedding),
            "fused": lambda: run(dmax_kernels.hybrid_embedding),
        }
    )


CASES = [
    Case(
        f"hybrid_embedding {rows} x 2048 {dtype}{' with gradient' if backward else ''}",
        lambda r=rows, d=dtype, b=backward: build(r, d, b),
    )
    for rows, dtype, backward in (
        (32, "bfloat16", False),
        (512, "bfloat16", False),
        (512, "float32", False),
        (512, "float32", True),
    )
]

test_benchmark = benchmark_of(CASES)
