"""What the CUDA compiler made of the kernels: no spill, no stack, 16-byte loads in flight.

Reads the report that the build of the CUDA library left (csrc/cuda/compile_report.py) and
the library's machine code. No GPU is needed; where nvcc was absent there is nothing to read.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dmax_kernels
from bench import kernels, sass
from dmax_kernels import _library

ROOT = Path(__file__).parents[1]
LIBRARY = dmax_kernels.libraries.cuda
pytestmark = pytest.mark.skipif(LIBRARY is None, reason=dmax_kernels.libraries.cuda_reason or "-")

# Kernels that stream vocabulary rows, with the 16-byte loads that each lane has in flight: the
# kernels with 16-bit types and float32 alike keep a whole 4 KB tile per warp in registers
STREAMING = (
    "top1_rows_kernel",
    "topk_rows_kernel",
    "row_statistics_kernel",
    "token_logprobs_kernel",
    "sample_rows_kernel",
    "sample_filtered_kernel",
    "spd_step_kernel",
    "edit_step_kernel",
    "oput_loss_kernel",
    "oput_loss_backward_kernel",
    "loss_and_grad_cluster_kernel",
    "loss_and_grad_two_pass_kernel",
)
OTHERS = (
    "prefix_promote_kernel",
    "transform_logits_kernel",
    "merge_shards_kernel",
    "hybrid_embedding_kernel",
    "hybrid_backward_positions_kernel",
    "hybrid_backward_tokens_kernel",
    "hybrid_backward_mask_slices_kernel",
    "hybrid_backward_mask_row_kernel",
)


@pytest.fixture(scope="module")
def report():
    return json.loads(LIBRARY.with_suffix(".json").read_text())


def test_every_kernel_is_reported_for_every_architecture(report):
    assert report["architectures"]
    for architecture in report["architectures"]:
        names = {
            kernel["kernel"].split("<")[0]
            for kernel in report["kernels"]
            if kernel["architecture"] == f"sm_{architecture}"
        }
        assert names == set(STREAMING + OTHERS), architecture


@pytest.mark.skipif(torch.cuda.is_available(), reason="built for this machine's GPU alone")
def test_architectures_without_a_gpu(report):
    """Ampere, Hopper and Blackwell, unless the build was told otherwise."""
    cache = ROOT / "build" / "dev" / "CMakeCache.txt"
    if cache.is_file() and not re.search(
        r"^DMAX_CUDA_ARCHITECTURES:STRING=$", cache.read_text(), re.M
    ):
        pytest.skip("DMAX_CUDA_ARCHITECTURES is set")
    assert report["architectures"] == ["80", "90a", "100"]


def test_no_spill_no_stack(report):
    bad = [k for k in report["kernels"] if k["spill_bytes"] or k["stack_bytes"]]
    assert not bad


# The first match counts. Blocks of 256 threads: 64 registers let four share a multiprocessor, 80
# three, 128 two. Blocks of a cluster, of 320: 64 three, 96 two. The others have blocks of 128
# threads, and four of those fit with 128.
REGISTERS = {
    "top1_rows_kernel<Masked": 80,
    r"row_statistics_kernel<Masked<\w+>, RowTemperatures": 128,
    "top1_rows_kernel|transform_logits_kernel": 64,
    "oput_loss_backward_kernel": 64,
    r"loss_and_grad_cluster_kernel<\w+, false>": 64,
    r"loss_and_grad_cluster_kernel<\w+, true>": 96,
    r"(row_statistics|sample_rows|spd_step)_kernel<.*, true>": 96,
    "sample_filtered_kernel|token_logprobs_kernel": 128,
    "|".join(STREAMING): 80,
    "|".join(OTHERS): 128,
}


def test_registers(report):
    for kernel in report["kernels"]:
        limits = [most for name, most in REGISTERS.items() if re.match(name, kernel["kernel"])]
        assert kernel["registers"] <= limits[0], kernel


@pytest.fixture(scope="module")
def architecture(report):
    """One that the library has machine code for: Hopper's where it is there."""
    if sass.cuobjdump() is None:
        pytest.skip("no cuobjdump: neither a CUDA toolkit with it nor Triton is installed")
    known = [f"sm_{each}" for each in report["architectures"]]
    return kernels.ARCHITECTURE if kernels.ARCHITECTURE in known else known[0]


@pytest.fixture(scope="module")
def machine_code(architecture):
    """kernel -> the text of its instructions."""
    code = sass.machine_code(LIBRARY, architecture)
    return {name: [each.text for each in body] for name, body in code.items()}


def test_instructions_per_tile(report, architecture):
    """No streaming kernel issues 5 % more instructions for a tile than when the table was kept."""
    kept = json.loads(kernels.COUNTS.read_text())
    if (kept["compiler"], kept["architecture"]) != (report["compiler"], architecture):
        pytest.skip(
            f"the kept counts are of {kept['compiler']} and {kept['architecture']}, the library "
            f"is of {report['compiler']} and {architecture}"
        )
    found = kernels.counts_of(kernels.kernels_of(LIBRARY)[0])
    gone = kept["counts"].keys() - found.keys()
    assert not gone, "python bench/kernels.py --keep"
    grown = {
        name: f"{count} -> {found[name]}"
        for name, count in kept["counts"].items()
        if found[name] > 1.05 * count
    }
    assert not grown


def test_no_local_memory_in_the_machine_code(machine_code):
    for name, instructions in machine_code.items():
        local = [each for each in instructions if re.search(r"\b(LDL|STL)\b", each)]
        assert not local, name


# Eight 16-byte loads before anything waits for the first: within 24 instructions of one another.
# sample_filtered_kernel skips vectors whose ids are all forbidden, so each load has branches of its
# own, and the code for a row's ends, which a whole tile jumps over, lies between the loads.
# Where there is a mask, each load has a condition of its own.
LOADS_WITHIN = dict.fromkeys(STREAMING, 24) | {"sample_filtered_kernel": 160}
LOADS_WITHIN_MASKED = 48


@pytest.mark.parametrize("kernel", STREAMING)
def test_streaming_loops_keep_eight_vectors_in_flight(machine_code, kernel):
    bodies = {name: body for name, body in machine_code.items() if kernel in name}
    assert bodies
    for name, body in bodies.items():
        loads = [i for i, each in enumerate(body) if re.search(r"\bLDG\.E\S*\.128", each)]
        runs = [loads[i + 7] - loads[i] for i in range(len(loads) - 7)]
        within = LOADS_WITHIN_MASKED if "Masked" in name else LOADS_WITHIN[kernel]
        assert min(runs, default=10**9) <= within, name


def test_in_place_kernels_do_not_use_the_read_only_path(machine_code):
    """What the kernel itself overwrites may not be read through the non-coherent cache."""
    for name, body in machine_code.items():
        if "loss_and_grad" in name:
            assert not [each for each in body if re.search(r"LDG\S*\.128\S*CONSTANT", each)], name


def test_library_loads_in_a_fresh_process_without_a_gpu():
    """Nothing of the driver or of libtorch_cuda is needed before a kernel is launched."""
    code = "import dmax_kernels; print(dmax_kernels.libraries.cuda is not None)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


def test_ops_registered_for_cuda():
    for op in ("top1_confidence", "spd_step_", "oput_loss_and_grad_", "hybrid_embedding_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"dmax::{op}", "CUDA"), op


def test_broken_library_is_one_line(tmp_path, monkeypatch):
    """A file that does not load leaves CUDA to Triton, with the reason kept for `info`."""
    broken = tmp_path / _library.CUDA_LIBRARY
    broken.write_bytes(b"not a library")
    libraries = _library.Libraries()
    monkeypatch.setattr(_library, "_find", lambda name: broken)
    _library._load_cuda(libraries)
    assert libraries.cuda is None
    assert "does not load" in libraries.cuda_reason
    assert "\n" not in libraries.cuda_reason
