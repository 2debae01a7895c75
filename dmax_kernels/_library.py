"""Loads the compiled libraries and decides, once, which backend serves each op on which device.

PyTorch's dispatcher picks by device: the CPU slot is C++ (csrc/cpu), the CUDA slot is C++ where the
CUDA library was built and can run here, else Triton, else empty. This module is the only place that
knows that rule.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
from pathlib import Path

import torch

from dmax_kernels import _gpus

MIN_TORCH = (2, 10)
CPU_LIBRARY = "libdmax_cpu.so"
CUDA_LIBRARY = "libdmax_cuda.so"


class Libraries:
    """What was loaded, and why the rest was not (one line each, for ``info``)."""

    def __init__(self) -> None:
        self.cpu: Path | None = None
        self.cuda: Path | None = None
        self.cuda_reason = ""
        self.triton_ops: tuple[str, ...] = ()
        self.triton_reason = ""
        self.triton_slot: torch.library.Library | None = None

    def cuda_report(self) -> dict | None:
        """What the CUDA library was built for and with, and what ptxas said of every kernel."""
        return _report(self.cuda) if self.cuda else None

    def instruction_set(self) -> str:
        """The CPU instruction set the kernels run in; PyTorch's ATEN_CPU_CAPABILITY lowers it."""
        function = ctypes.CDLL(str(self.cpu)).dmax_cpu_instruction_set
        function.restype = ctypes.c_char_p
        return function().decode()


def _report(library: Path) -> dict | None:
    path = library.with_suffix(".json")
    return json.loads(path.read_text()) if path.is_file() else None


def _find(name: str) -> Path | None:
    import dmax_kernels

    # An editable install has two folders: the sources, and what CMake installed
    for folder in dmax_kernels.__path__:
        path = Path(folder) / "lib" / name
        if path.is_file():
            return path
    return None


def load() -> Libraries:
    installed = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if installed < MIN_TORCH:
        raise ImportError(
            f"dmax_kernels needs PyTorch {MIN_TORCH[0]}.{MIN_TORCH[1]} or newer, "
            f"found {torch.__version__}."
        )
    libraries = Libraries()
    libraries.cpu = _find(CPU_LIBRARY)
    if libraries.cpu is None:
        raise ImportError(
            f"dmax_kernels: {CPU_LIBRARY} is not there, so the package was not built. "
            "Run `pip install .` in the source folder (or `make build` to work on it)."
        )
    torch.ops.load_library(str(libraries.cpu))
    _load_cuda(libraries)
    _register_triton(libraries)
    return libraries


def _load_cuda(libraries: Libraries) -> None:
    """C++ kernels where they were built: the library loads without a GPU, and without a driver."""
    path = _find(CUDA_LIBRARY)
    if path is None:
        libraries.cuda_reason = "not built (no nvcc when the package was installed)"
        return
    if reason := _fits_no_gpu(path):
        libraries.cuda_reason = reason
        return
    try:
        torch.ops.load_library(str(path))
    except OSError as error:  # e.g. a CUDA runtime of a different major version
        libraries.cuda_reason = f"{path.name} does not load: {error}"
        return
    libraries.cuda = path


def _fits_no_gpu(path: Path) -> str:
    """Why Triton should serve this machine: the library has code for none of its GPUs; else ""."""
    report = _report(path)
    gpus = sorted(set(_gpus.capabilities()))
    if report is None or not gpus or importlib.util.find_spec("triton") is None:
        return ""
    if any(_gpus.runs_on(each, gpu) for each in report["architectures"] for gpu in gpus):
        return ""
    built = ", ".join(f"sm_{each}" for each in report["architectures"])
    here = ", ".join(f"sm_{major}{minor}" for major, minor in gpus)
    return f"built for {built}, but the GPU here is {here}: install again on this machine"


def _register_triton(libraries: Libraries) -> None:
    """Registers Triton where the CUDA slot is empty: every op without the CUDA library, otherwise
    those that have no CUDA C++ (the ones with a matrix product). Triton is imported when an op
    first runs.

    Plain registrations, not torch.library.triton_op: that would define the op a second time, in
    Python (an error, tried with torch 2.13), where one schema in C++ serves every backend. Its
    advantage is that Inductor sees the kernels; but ours read and write their tensors once, have no
    elementwise neighbour to fuse with, and the launch code looks at strides, which a trace freezes.
    """
    if importlib.util.find_spec("triton") is None:
        libraries.triton_reason = "not installed"
        return
    from dmax_kernels.triton import IMPLEMENTATIONS

    slot = torch.library.Library("dmax", "IMPL", "CUDA")
    missing = [
        name
        for name in IMPLEMENTATIONS
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"dmax::{name}", "CUDA")
    ]
    for name in missing:
        slot.impl(name, IMPLEMENTATIONS[name])
    libraries.triton_ops = tuple(missing)
    libraries.triton_slot = slot  # the registrations live as long as this object
