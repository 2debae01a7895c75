"""linear_top1_confidence against the LM head's product followed by top1_confidence, and eager.

On the CPU the products in front are at the vocabulary's full width, in the inputs' dtype; ours are
float32, block by block. On a GPU: python bench/bench_linear_top1_confidence.py, which adds
torch.compile and, where installed, nothing else does this op: FlashInfer and Liger store logits or
give no confidence.
"""

import torch

import dmax_kernels
from bench.cases import DIM, DTYPES, VOCAB, Case, Work, benchmark_of

ROWS = (1, 32, 64, 128, 256, 1024, 4096, 8192)


def operands(rows, dtype, device="cpu"):
    generator = torch.manual_seed(0)
    hidden = torch.randn(rows, DIM, generator=generator).to(device, dtype)
    weight = torch.randn(VOCAB, DIM, generator=generator).mul_(DIM**-0.5).to(device, dtype)
    return hidden, weight


def candidates(hidden, weight):
    def eager():
        probability = torch.softmax((hidden @ weight.t()).float(), dim=-1)
        return probability.max(dim=-1)

    return {
        "eager": eager,
        "product, then top1_confidence": lambda: dmax_kernels.top1_confidence(hidden @ weight.t()),
        "fused": lambda: dmax_kernels.linear_top1_confidence(hidden, weight),
    }


NAMES = ("eager", "product, then top1_confidence", "fused")
CASES = [
    Case(
        f"linear_top1_confidence {rows} x {DIM} x {VOCAB} {dtype}",
        lambda r=rows, d=dtype: Work(candidates(*operands(r, DTYPES[d]))),
        candidates=NAMES,
    )
    for rows, dtype in ((32, "float32"), (32, "bfloat16"))
]

test_benchmark = benchmark_of(CASES)
