"""The table of what is measured: workloads at the shapes that are kept, and what they must reach.

``python bench/run.py`` (``make bench``) times the candidates of a case in turn, in one run, and
writes the ratios, which are the figures to quote.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from dmax_kernels.bench.workload import DIM, DTYPES, VALUES, VOCAB, WORKLOADS, Inputs, Work

CANDIDATES = ("eager", "fused")  # that every workload has


@dataclass(frozen=True)
class Case:
    """A workload at one shape. The targets are those of the design."""

    workload: str
    sizes: tuple[int, ...]
    dtype: str = "bfloat16"
    values: str = "flat"
    speedup_target: float | None = None  # over eager, on a CPU
    bandwidth_target: float | None = None  # share of the floor measured in the same run
    target_us: float | None = None  # on an H200
    # Predicted before any run: bytes over 4.3 TB/s, the copy bandwidth expected of an H200, plus 2
    # us of launch, plus 2 us where a second phase follows the stream
    predicted_us: float | None = None
    compiled: bool = False  # torch.compile is a candidate too

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
ROWS = (32, 1, 256)
BLOCK_ROWS = (32, VOCAB)
# With a product
LINEAR = ("linear_top1_confidence", "linear_sample_tokens", "linear_token_logprobs")
LINEAR += ("soft_embedding",)
# Draws with filters: top_k = 50, top_p = 0.9, and these with min_p = 0.05
FILTERED = ("sample_top_k", "sample_top_p", "sample_filtered")

# Workload -> its sizes at a given number of rows. A step has one block per sequence, of 32
# positions or of one; the joint loss runs two passes over that many positions.
OF_ROWS = {
    "top1_confidence": lambda rows: (rows, VOCAB),
    "topk_confidence": lambda rows: (rows, VOCAB, 4),
    "row_statistics": lambda rows: (rows, VOCAB),
    "token_logprobs": lambda rows: (rows, VOCAB, 20),
    "sample_tokens": lambda rows: (rows, VOCAB),
    **dict.fromkeys(FILTERED, lambda rows: (rows, VOCAB)),
    "top_p_cut": lambda rows: (rows, VOCAB),
    "draw_with_entropy": lambda rows: (rows, VOCAB),
    "penalties": lambda rows: (rows, VOCAB),
    "transform_logits_": lambda rows: (rows, VOCAB),
    "top1_partial": lambda rows: (rows, VOCAB, 8),
    "sample_partial": lambda rows: (rows, VOCAB, 8),
    "spd_step_": lambda rows: (rows // min(rows, 32), min(rows, 32)),
    "edit_step_": lambda rows: (rows // min(rows, 32), min(rows, 32)),
    "oput_loss": lambda rows: (rows, VOCAB),
    "oput_loss_and_grad_": lambda rows: (rows, VOCAB),
    "hybrid_embedding": lambda rows: (rows,),
    "hybrid_embedding_backward": lambda rows: (rows,),
    "soft_embedding": lambda rows: (rows, DIM, VOCAB),
    "linear_top1_confidence": lambda rows: (rows, DIM, VOCAB),
    "linear_sample_tokens": lambda rows: (rows, DIM, VOCAB),
    "linear_token_logprobs": lambda rows: (rows, DIM, VOCAB),
}
WITHOUT_LOGITS = ("hybrid_embedding", "hybrid_embedding_backward", *LINEAR)  # no logits to peak


def cpu_targets(workload: str, rows: int, dtype: str, values: str) -> dict[str, float]:
    """The design's targets for a cell: speed-up over eager and share of bandwidth."""
    if workload == "top1_confidence" and rows >= 32:
        speedup = {"speedup_target": 8 if dtype == "float32" else 25}
        return speedup | ({"bandwidth_target": 0.8} if values == "peaked" else {})
    if workload == "spd_step_" and rows == 32:
        return {"speedup_target": 8}
    if workload == "oput_loss" and rows >= 32:
        return {"speedup_target": 2}
    return {"speedup_target": 1} if workload == "linear_top1_confidence" and rows >= 32 else {}


def cell(workload: str, rows: int, dtype: str, values: str) -> Case:
    targets = cpu_targets(workload, rows, dtype, values)
    return Case(workload, OF_ROWS[workload](rows), dtype, values, **targets)


# Every op x dtype x rows x values; the loops come last. A run with too little time leaves the last
# ones out.
CPU_CASES = [
    *(
        cell(workload, rows, dtype, values)
        for rows in ROWS
        for workload in OF_ROWS
        if workload not in LINEAR
        for dtype in FLOATS
        for values in (VALUES[:1] if workload in WITHOUT_LOGITS else VALUES)
    ),
    *(Case("prefix_promote", (blocks, 32), "float32") for blocks in (1, 32, 1024)),
    *(cell(name, rows, dtype, "flat") for rows in ROWS for name in LINEAR for dtype in FLOATS),
    *(cell("soft_embedding", rows, dtype, "peaked") for rows in ROWS for dtype in FLOATS),
    Case("oput_step", (8,), "float32"),
    Case("spd_generate", (8, 96), "float32"),
    *(
        Case("linear_oput_loss", (tokens, DIM, VOCAB), dtype)
        for tokens in (64, 128, 512)
        for dtype in FLOATS
    ),
]


def is_quick(case: Case) -> bool:
    """One block of flat rows for every op without a matrix product: an overview in a minute."""
    many = case.workload in OF_ROWS and case.sizes == OF_ROWS[case.workload](32)
    return (
        case.values == "flat"
        and case.workload not in LINEAR
        and (many or case.workload == "prefix_promote")
    )


GPU_CASES = [
    Case("edit_step_", (1, 32), predicted_us=8.3),  # top1_confidence's bytes, and an arrival more
    Case("edit_step_", (16, 32)),
    Case("hybrid_embedding", (32,), target_us=3.0),
    Case("hybrid_embedding", (4096,)),
    Case("linear_oput_loss", (1024, DIM, VOCAB), compiled=True),
    # 20.0 TFLOP, with the logits of all but 1,707 of 8,192 rows computed twice: 27 ms at 730
    # TFLOP/s, and 4 ms of statistics, rounding and adding
    Case("linear_oput_loss", (4096, DIM, VOCAB), target_us=24000.0, predicted_us=31000.0),
    *(Case("linear_sample_tokens", (n, DIM, VOCAB)) for n in (1, 32, 64, 256, 1024, 4096)),
    Case("linear_token_logprobs", (64, DIM, VOCAB)),
    # Every row count of the dispatch: the fused op must not be slower than the product at any of
    # them
    *(
        Case(
            "linear_top1_confidence",
            (rows, DIM, VOCAB),
            target_us=150.0 if rows <= 64 else None,
            compiled=rows in (32, 4096),
        )
        for rows in (1, 16, 32, 64, 128, 256, 512, 1024, 4096, 8192)
    ),
    *(
        Case("linear_top1_confidence", (rows, DIM, VOCAB), "float32")
        for rows in (1, 16, 32, 64, 256, 1024)
    ),
    Case("oput_loss", (4096, VOCAB), target_us=1700.0, compiled=True),
    Case("oput_loss_and_grad_", (4096, VOCAB), target_us=1200.0, predicted_us=1250.0),
    Case("penalties", BLOCK_ROWS),
    Case("prefix_promote", (16, 32), target_us=2.5),
    # The prediction is top1_confidence's, since the bytes are the same
    Case("row_statistics", BLOCK_ROWS, predicted_us=6.0, compiled=True),
    Case("row_statistics", (4096, VOCAB), predicted_us=310.0, compiled=True),
    Case("sample_partial", (*BLOCK_ROWS, 8)),
    Case("sample_tokens", BLOCK_ROWS, predicted_us=9.0, compiled=True),
    Case("sample_tokens", (1024, VOCAB)),
    *(Case(workload, BLOCK_ROWS, values=values) for workload in FILTERED for values in VALUES),
    *(Case("top_p_cut", BLOCK_ROWS, values=values) for values in VALUES),
    # A shape of vLLM's figures for FlashInfer's samplers (its pull request 40376)
    *(
        Case(workload, (64, 131072), dtype)
        for workload in ("sample_top_k", "sample_top_p", "sample_top_k_top_p")
        for dtype in reversed(FLOATS)
    ),
    *(Case("soft_embedding", (rows, DIM, VOCAB)) for rows in (1, 32, 256, 4096)),
    Case("spd_step_", (1, 32), target_us=8.0, predicted_us=8.5),
    Case("spd_step_", (16, 32), target_us=45.0, predicted_us=46.0),
    Case("top1_confidence", (1, VOCAB)),
    Case("top1_confidence", BLOCK_ROWS, target_us=6.0, predicted_us=6.0, compiled=True),
    Case("top1_confidence", BLOCK_ROWS, "float32"),
    Case("top1_confidence", (256, VOCAB), predicted_us=22.0),
    Case("top1_confidence", (1024, VOCAB), predicted_us=78.0),
    Case("top1_confidence", (4096, VOCAB), bandwidth_target=0.9, predicted_us=310.0, compiled=True),
    Case("top1_partial", (*BLOCK_ROWS, 8)),
    Case("token_logprobs", (*BLOCK_ROWS, 20)),
    Case("token_logprobs", (4096, VOCAB, 0)),
    Case("topk_confidence", (*BLOCK_ROWS, 4)),
    Case("transform_logits_", BLOCK_ROWS),
    Case("transform_logits_", (1024, VOCAB)),
]

# The ten most informative cases, the best first: a GPU session starts with these
KEY_CASES = (
    ("top1_confidence", (32, VOCAB)),
    ("top1_confidence", (4096, VOCAB)),
    ("spd_step_", (1, 32)),
    ("spd_step_", (16, 32)),
    ("sample_tokens", (32, VOCAB)),
    ("oput_loss", (4096, VOCAB)),
    ("oput_loss_and_grad_", (4096, VOCAB)),
    ("linear_top1_confidence", (32, DIM, VOCAB)),
    ("linear_top1_confidence", (4096, DIM, VOCAB)),
    ("linear_oput_loss", (4096, DIM, VOCAB)),
)


def key_cases() -> list[Case]:
    by_shape = {(case.workload, case.sizes, case.dtype): case for case in GPU_CASES}
    return [by_shape[(*key, "bfloat16")] for key in KEY_CASES]


# How cost grows: (workload, the size that grows, its values, all sizes at one value), powers of 4
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
