"""What the compiler makes of every Triton kernel for three GPU generations; no GPU is needed.

A spill, a stack frame or a load narrower than 16 bytes costs more than any tuning gains, and a new
Triton can bring one in.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

SCRIPT = Path(__file__).parent / "triton_compile.py"
# At 128 threads per program, 128 registers leave room for four programs per multiprocessor. The
# entropy takes more, which keeps logits and weights of a tile (three programs);
# tile_statistics_kernel does so on sm_80 alone.
# A matrix product keeps its accumulators in registers and takes all there are.
MOST_REGISTERS = {
    "tile_statistics_kernel": 160,
    "tile_entropy_kernel": 168,
    "tile_counts_kernel": 184,
    "linear_statistics_kernel": 255,
    "linear_loss_partials_kernel": 255,
    "logits_grad_kernel": 255,
    "soft_embedding_kernel": 255,
}
# Kernels that stream rows or embeddings; the others read a few statistics or positions
STREAMING = {
    "tile_statistics_kernel",
    "tile_topk_kernel",
    "tile_entropy_kernel",
    "tile_counts_kernel",
    "tile_sample_kernel",
    "draw_tiles_kernel",
    "sample_filtered_kernel",
    "transform_kernel",
    "top_p_cut_kernel",
    "tile_sums_kernel",
    "grad_kernel",
    "hybrid_embedding_kernel",
    "position_grad_kernel",
    "mask_grad_kernel",
    "table_grad_kernel",
    "embed_kernel",
    "linear_statistics_kernel",
    "linear_loss_partials_kernel",
    "logits_grad_kernel",
    "soft_embedding_kernel",
}


@pytest.fixture(scope="module", params=["sm_80", "sm_90", "sm_100"])
def report(request):
    """The script's report, from a process of its own: no interpreter is switched on there."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    result = subprocess.run(
        [sys.executable, str(SCRIPT), request.param],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_no_spill_and_no_stack_frame(report):
    # On sm_100, Triton leaves this frame in a kernel that has registers to spare. Releases other
    # than the one in requirements.lock leave some in one form of a kernel, on one architecture
    allowed = {"soft_embedding_kernel": 16}
    if triton.__version__.startswith("3.6"):
        allowed |= {"table_grad_kernel": 8, "sample_filtered_kernel": 8}
    if triton.__version__.startswith("3.8"):
        allowed |= {"tile_statistics_kernel": 8, "linear_statistics_kernel": 40}
    bad = {
        kernel: figures
        for kernel, figures in report["kernels"].items()
        if figures["stack"] > allowed.get(kernel.split("#")[0], 0)
    }
    assert not bad


def test_registers(report):
    for kernel, figures in report["kernels"].items():
        most = MOST_REGISTERS.get(kernel.split("#")[0], 128)
        assert figures["registers"] <= most, kernel


def test_streaming_kernels_load_16_bytes_per_thread(report):
    streaming = {kernel for kernel in report["kernels"] if kernel.split("#")[0] in STREAMING}
    assert {kernel.split("#")[0] for kernel in streaming} == STREAMING
    assert not [kernel for kernel in streaming if not report["kernels"][kernel]["wide_loads"]]


def test_a_new_run_time_value_recompiles_nothing(report):
    """Ids, thresholds, temperatures, row counts: a compilation in a decoding step takes seconds."""
    assert not report["recompiled"]


def test_matrix_products_use_the_tensor_cores(report):
    prefixes = ("linear_statistics", "linear_loss_partials", "logits_grad")
    linear = {k: v for k, v in report["kernels"].items() if k.startswith(prefixes)}
    assert linear
    assert all(figures["tensor_core"] > 0 for figures in linear.values())
