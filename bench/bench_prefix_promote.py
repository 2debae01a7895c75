"""prefix_promote against its eager reference: the same eight small ops that engines run today."""

import torch

import dmax_kernels
from bench.cases import Case, Work, benchmark_of
from dmax_kernels import reference


def build(rows):
    generator = torch.manual_seed(0)
    confidence = torch.rand(rows, 32, generator=generator)
    masked = torch.rand(rows, 32, generator=generator) < 0.7
    return Work(
        {
            "eager": lambda: reference.prefix_promote(confidence, masked, 0.5),
            "fused": lambda: dmax_kernels.prefix_promote(confidence, masked, 0.5),
        }
    )


CASES = [Case(f"prefix_promote {rows} x 32", lambda rows=rows: build(rows)) for rows in (1, 1024)]

test_benchmark = benchmark_of(CASES)
