"""linear_top1_confidence against the LM head's product followed by top1_confidence, and eager.

The products in front are in the inputs' dtype over the whole vocabulary, and so round 16-bit
logits; ours stay float32. Where there is a GPU the cases are there, at every row count of the
dispatch; a time then holds one launch and one wait for the device, alike for all candidates.
"""

import torch

import dmax_kernels
from bench.cases import DIM, DTYPES, VOCAB, Case, Work, benchmark_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = (
    [(rows, "bfloat16") for rows in (1, 16, 32, 64, 128, 256, 512, 1024, 4096, 8192)]
    if DEVICE == "cuda"
    else [(32, "float32"), (32, "bfloat16")]
)


def operands(rows, dtype):
    generator = torch.manual_seed(0)
    hidden = torch.randn(rows, DIM, generator=generator)
    weight = torch.randn(VOCAB, DIM, generator=generator).mul_(DIM**-0.5)
    return hidden.to(DEVICE, DTYPES[dtype]), weight.to(DEVICE, DTYPES[dtype])


def finished(function):
    """Returns when the device has done the work, which is when the timer stops."""
    if DEVICE == "cpu":
        return function

    def run():
        function()
        torch.cuda.synchronize()

    return run


def build(rows, dtype):
    hidden, weight = operands(rows, dtype)

    def eager(hidden, weight):
        return torch.softmax((hidden @ weight.t()).float(), dim=-1).max(dim=-1)

    candidates = {
        "eager": lambda: eager(hidden, weight),
        "product, then top1_confidence": lambda: dmax_kernels.top1_confidence(hidden @ weight.t()),
        "fused": lambda: dmax_kernels.linear_top1_confidence(hidden, weight),
    }
    if DEVICE == "cuda":
        compiled = torch.compile(eager)
        candidates["torch.compile"] = lambda: compiled(hidden, weight)
    return Work({name: finished(function) for name, function in candidates.items()})


NAMES = ("eager", "product, then top1_confidence", "fused")
CASES = [
    Case(
        f"linear_top1_confidence {rows} x {DIM} x {VOCAB} {dtype}",
        lambda r=rows, d=dtype: build(r, d),
        candidates=(*NAMES, "torch.compile") if DEVICE == "cuda" else NAMES,
    )
    for rows, dtype in SHAPES
]

test_benchmark = benchmark_of(CASES)
