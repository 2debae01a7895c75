"""The table of what is measured: workloads at the shapes that are kept, and what they must reach.

``python bench/run.py`` (``make bench``) times the candidates of a case in turn, in one run, and
writes the ratios: those are the figures to quote.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from dmax_kernels.bench.workload import DIM, DTYPES, VALUES, VOCAB, WORKLOADS, Inputs, Work

CANDIDATES = ("eager", "fused")  # in every workload, whatever else it has


@dataclass(frozen=True)
class Case:
    """A workload at one shape. The targets are those of the design."""

    workload: str
    sizes: tuple[int, ...]
    dtype: str = "bfloat16"
    values: str = "flat"
    speedup_target: float | None = None  # over eager, on a CPU
    bandwidth_target: float | None = None  # share of what is measured beside it
    target_us: float | None = None  # on an H200
    # Written before any run: bytes over 4.3 TB/s, the copy bandwidth expected of an H200, plus 2 us
    # of launch, plus 2 us where a second phase follows the stream
    predicted_us: float | None = None
    compiled: bool = False  # torch.compile is a candidate, too

    @property
    def all_sizes(self) -> tuple[int, ...]:
        return WORKLOADS[self.workload].all_sizes(self.sizes)

    @property
    def name(self) -> str:
        shape = " x ".join(map(str, self.all_sizes))
        return f"{self.workload} {shape} {self.dtype} {self.values}"

    def inputs(self, device: str = "cpu") -> Inputs:
        return Inputs(DTYPES[self.dtype], device, self.values)

    def work(self, device: str = "cpu") -> Work:
        return WORKLOADS[self.workload].work(self.inputs(device), self.sizes)


FLOATS = ("float32", "bfloat16")
BLOCK_ROWS = (32, VOCAB)

# One row where threads share the vocabulary, a block of rows, and rows that leave every cache
CPU_CASES = [
    Case("hybrid_embedding", (32,)),
    Case("hybrid_embedding", (512,)),
    Case("hybrid_embedding", (512,), "float32"),
    Case("hybrid_embedding_backward", (512,), "float32"),
    *(Case("linear_oput_loss", (64, DIM, VOCAB), dtype) for dtype in FLOATS),
    *(Case("linear_sample_tokens", (32, DIM, VOCAB), dtype) for dtype in FLOATS),
    *(
        Case("linear_top1_confidence", (rows, DIM, VOCAB), dtype, speedup_target=1)
        for rows in (32, 256)
        for dtype in FLOATS
    ),
    *(Case("oput_loss", (64, VOCAB), dtype, speedup_target=2) for dtype in FLOATS),
    Case("oput_loss_and_grad_", (64, VOCAB)),
    Case("oput_step", (8,), "float32"),
    *(Case("prefix_promote", (blocks, 32)) for blocks in (1, 1024)),
    *(
        Case("row_statistics", (rows, VOCAB), dtype, values)
        for rows in (1, 32)
        for dtype in FLOATS
        for values in VALUES
    ),
    *(Case("sample_partial", (*BLOCK_ROWS, 8), dtype) for dtype in FLOATS),
    *(Case("sample_tokens", BLOCK_ROWS, dtype, values) for dtype in FLOATS for values in VALUES),
    Case("spd_generate", (8, 96), "float32"),
    *(
        Case("spd_step_", (1, 32), dtype, values, speedup_target=8)
        for dtype in FLOATS
        for values in VALUES
    ),
    Case("spd_step_", (4, 32), "bfloat16", "peaked"),
    Case("top1_confidence", (1, VOCAB)),
    Case("top1_confidence", BLOCK_ROWS, "float32", "flat", speedup_target=8, compiled=True),
    Case("top1_confidence", BLOCK_ROWS, "float32", "peaked", 8, bandwidth_target=0.8),
    Case("top1_confidence", BLOCK_ROWS, "bfloat16", "flat", speedup_target=25, compiled=True),
    Case("top1_confidence", BLOCK_ROWS, "bfloat16", "peaked", 25, bandwidth_target=0.8),
    Case("top1_confidence", (256, VOCAB), "bfloat16", "flat"),
    Case("top1_confidence", (256, VOCAB), "bfloat16", "peaked", bandwidth_target=0.8),
    *(Case("top1_partial", (*BLOCK_ROWS, 8), dtype) for dtype in FLOATS),
    *(Case("topk_confidence", (*BLOCK_ROWS, k), dtype) for dtype in FLOATS for k in (3, 8)),
]

GPU_CASES = [
    Case("hybrid_embedding", (32,), target_us=3.0),
    Case("hybrid_embedding", (4096,)),
    Case("linear_oput_loss", (1024, DIM, VOCAB), compiled=True),
    # 21.1 TFLOP with the recomputed logits: 29 ms at 730 TFLOP/s, and 3 ms of rounding and adding
    Case("linear_oput_loss", (4096, DIM, VOCAB), target_us=24000.0, predicted_us=32000.0),
    *(Case("linear_sample_tokens", (n, DIM, VOCAB)) for n in (1, 32, 64, 256, 1024, 4096)),
    # Every row count of the dispatch: the fused op may be slower than the product at none of them
    *(
        Case(
            "linear_top1_confidence",
            (rows, DIM, VOCAB),
            target_us=150.0 if rows <= 64 else None,
            compiled=rows in (32, 4096),
        )
        for rows in (1, 16, 32, 64, 128, 256, 512, 1024, 4096, 8192)
    ),
    Case("oput_loss", (4096, VOCAB), target_us=1700.0, compiled=True),
    Case("oput_loss_and_grad_", (4096, VOCAB), target_us=1200.0, predicted_us=1250.0),
    Case("prefix_promote", (16, 32), target_us=2.5),
    # Predicted as top1_confidence: the same bytes
    Case("row_statistics", BLOCK_ROWS, predicted_us=6.0, compiled=True),
    Case("row_statistics", (4096, VOCAB), predicted_us=310.0, compiled=True),
    Case("sample_partial", (*BLOCK_ROWS, 8)),
    Case("sample_tokens", BLOCK_ROWS, predicted_us=9.0, compiled=True),
    Case("sample_tokens", (1024, VOCAB)),
    Case("spd_step_", (1, 32), target_us=8.0, predicted_us=8.5),
    Case("spd_step_", (16, 32), target_us=45.0, predicted_us=46.0),
    Case("top1_confidence", (1, VOCAB)),
    Case("top1_confidence", BLOCK_ROWS, target_us=6.0, predicted_us=6.0, compiled=True),
    Case("top1_confidence", BLOCK_ROWS, "float32"),
    Case("top1_confidence", (256, VOCAB), predicted_us=22.0),
    Case("top1_confidence", (1024, VOCAB), predicted_us=78.0),
    Case("top1_confidence", (4096, VOCAB), bandwidth_target=0.9, predicted_us=310.0, compiled=True),
    Case("top1_partial", (*BLOCK_ROWS, 8)),
    Case("topk_confidence", (*BLOCK_ROWS, 4)),
]

# How cost grows: workload, the size that grows, its values, all sizes at a value; powers of 4
# around LLaDA-2.0-mini's shapes
SERIES = (
    ("top1_confidence", "rows", (1, 4, 16, 64, 256), lambda rows: (rows, VOCAB)),
    ("top1_confidence", "vocab", (2048, 8192, 32768, 131072, 524288), lambda vocab: (32, vocab)),
    ("spd_step_", "batch", (1, 2, 4, 8), lambda batch: (batch, 32, VOCAB, 256)),
    ("oput_loss", "tokens", (4, 16, 64), lambda tokens: (tokens, VOCAB)),
)


def cases_of(ops: Sequence[str] = (), device: str = "cpu") -> list[Case]:
    """The cases of these workloads (default: all), for this device."""
    if unknown := set(ops) - set(WORKLOADS):
        names = ", ".join(sorted(unknown))
        sys.exit(f"bench: no benchmark of {names}; there are: {', '.join(WORKLOADS)}")
    cases = GPU_CASES if device == "cuda" else CPU_CASES
    return [case for case in cases if not ops or case.workload in ops]
