"""linear_sample_tokens against the product followed by sample_tokens, and eager multinomial."""

import torch

import dmax_kernels
from bench.bench_linear_top1_confidence import DEVICE, SHAPES, finished, operands
from bench.cases import DIM, VOCAB, Case, Work, benchmark_of


def build(rows, dtype):
    hidden, weight = operands(rows, dtype)
    seed = torch.tensor([1, 2], device=DEVICE)

    def eager():
        probability = torch.softmax((hidden @ weight.t()).float(), dim=-1)
        token = torch.multinomial(probability, 1)
        return token, probability.gather(-1, token)

    candidates = {
        "eager": eager,
        "product, then sample_tokens": lambda: dmax_kernels.sample_tokens(
            hidden @ weight.t(), seed
        ),
        "fused": lambda: dmax_kernels.linear_sample_tokens(hidden, weight, seed),
    }
    return Work({name: finished(function) for name, function in candidates.items()})


CASES = [
    Case(
        f"linear_sample_tokens {rows} x {DIM} x {VOCAB} {dtype}",
        lambda r=rows, d=dtype: build(r, d),
        candidates=("eager", "product, then sample_tokens", "fused"),
    )
    for rows, dtype in SHAPES
]

test_benchmark = benchmark_of(CASES)
