"""Which implementation of the ops a loop runs on."""

from __future__ import annotations

from types import ModuleType


def select_ops(ops: str) -> ModuleType:
    """`dmax_kernels.reference` for "reference", `dmax_kernels` for "fused": same functions."""
    if ops == "reference":
        import dmax_kernels.reference as module
    elif ops == "fused":
        import dmax_kernels as module
    else:
        raise ValueError(f'select_ops: ops must be "reference" or "fused", got {ops!r}')
    return module
