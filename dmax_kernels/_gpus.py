"""The machine's GPUs as the driver's management library (NVML) knows them.

Asking PyTorch would initialise CUDA, which an import must not do: a process that forks afterwards
could no longer use the GPU.
"""

from __future__ import annotations

import ctypes


def capabilities() -> list[tuple[int, int]]:
    """Compute capability of every GPU; empty without a GPU or a driver, or if NVML fails."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return []
    if nvml.nvmlInit_v2() != 0:
        return []
    try:
        count = ctypes.c_uint(0)
        if nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
            return []
        found = []
        for index in range(count.value):
            device, major, minor = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
            if nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(device)) != 0:
                continue
            if nvml.nvmlDeviceGetCudaComputeCapability(
                device, ctypes.byref(major), ctypes.byref(minor)
            ):
                continue
            found.append((major.value, minor.value))
        return found
    finally:
        nvml.nvmlShutdown()


def runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether machine code for sm_<architecture> runs there: it needs the same major version and at
    least its minor version; "90a" runs on 9.0 alone."""
    number = int(architecture.rstrip("af"))
    if architecture.endswith("a"):
        return divmod(number, 10) == capability
    return number // 10 == capability[0] and number % 10 <= capability[1]
