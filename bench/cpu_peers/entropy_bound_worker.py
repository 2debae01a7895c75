"""Compiles entropy_bound_worker.cpp for this machine, once, and calls it."""

from __future__ import annotations

import ctypes
import os
import subprocess
from functools import cache
from pathlib import Path

import torch

SOURCE = Path(__file__).with_suffix(".cpp")
LIBRARY = SOURCE.parent.parent.parent / "build" / "bench" / "entropy_bound_worker.so"


@cache
def library() -> ctypes.CDLL:
    if not LIBRARY.exists() or LIBRARY.stat().st_mtime < SOURCE.stat().st_mtime:
        LIBRARY.parent.mkdir(parents=True, exist_ok=True)
        command = [os.environ.get("CXX", "c++"), "-O3", "-march=native", "-std=c++17", "-shared"]
        command += ["-fPIC", "-pthread", str(SOURCE), "-o", str(LIBRARY)]
        subprocess.run(command, check=True, capture_output=True)
    return ctypes.CDLL(str(LIBRARY))


def run(
    logits: torch.Tensor, uniform: torch.Tensor, threads: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(largest, drawn, entropy) of float32 rows; `uniform` has a number in [0, 1) for each."""
    rows, vocab = logits.shape
    top, drawn = (torch.empty(rows, dtype=torch.int64) for _ in range(2))
    entropy = torch.empty(rows)
    tensors = [ctypes.c_void_p(x.data_ptr()) for x in (logits, uniform, top, drawn, entropy)]
    sizes = [ctypes.c_int64(rows), ctypes.c_int64(vocab), ctypes.c_int(threads)]
    library().entropy_bound_worker(*tensors[:2], *sizes, *tensors[2:])
    return top, drawn, entropy
