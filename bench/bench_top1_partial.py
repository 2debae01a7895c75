"""top1_partial over 8 shards and top1_merge, as tensor-parallel ranks would run them."""

import torch

import dmax_kernels
from bench.cases import DTYPES, Case, Work, benchmark_of, flat_logits
from dmax_kernels import reference


def build(dtype):
    shards = flat_logits(32, DTYPES[dtype]).chunk(8, dim=-1)
    width = shards[0].shape[-1]

    def run(backend):
        parts = [backend.top1_partial(shard, i * width) for i, shard in enumerate(shards)]
        return backend.top1_merge(*(torch.stack(column) for column in zip(*parts, strict=True)))

    return Work({"eager": lambda: run(reference), "fused": lambda: run(dmax_kernels)})


CASES = [Case(f"top1_partial 8 shards of 32 x 19648 {d}", lambda d=d: build(d)) for d in DTYPES]

test_benchmark = benchmark_of(CASES)
