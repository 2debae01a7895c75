"""Triton where this build has no CUDA C++ kernel: every op of a CPU build, else the ops with a
matrix product. Triton is imported when an op first runs."""

import importlib.util

import torch

from ._ops import add_op_namespace_prefix
from .triton import IMPLEMENTATIONS


def fill_cuda_slots() -> "torch.library.Library | None":
    if importlib.util.find_spec("triton") is None:
        return None
    namespace = add_op_namespace_prefix("").rstrip(":")
    slots = torch.library.Library(namespace, "IMPL", "CUDA")
    for name, function in IMPLEMENTATIONS.items():
        op = add_op_namespace_prefix(name)
        if not torch._C._dispatch_has_kernel_for_dispatch_key(op, "CUDA"):
            slots.impl(name, function)
    return slots
