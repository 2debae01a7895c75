"""Triton kernels: every op for installs without nvcc, and the ops fused with the LM head.

One file per family, whose functions take the arguments of ``torch.ops.dmax.<op>``, give its results
and trust their arguments. :data:`IMPLEMENTATIONS` lists them for the dispatcher, each behind the
check that the C++ kernels make (csrc/checks). Nothing here imports Triton before the first call of
an op, so that ``import dmax_kernels`` costs nothing where Triton is absent.
"""

import functools
import importlib
from collections.abc import Callable
from types import ModuleType

import torch

from dmax_kernels.ops._register import FAMILY_OF

# The Triton that PyTorch 2.10, the oldest PyTorch the package supports, is shipped with
MINIMUM_TRITON = (3, 6)


def check_triton_version(version: str) -> None:
    """Raises where the installed Triton is too old."""
    installed = tuple(int(number) for number in version.split(".")[:2])
    if installed < MINIMUM_TRITON:
        needed = ".".join(map(str, MINIMUM_TRITON))
        raise RuntimeError(
            f"dmax_kernels: the Triton kernels need Triton {needed} or newer, found {version}; "
            f"install PyTorch 2.10 or newer, or build dmax_kernels with nvcc"
        )


@functools.cache
def _load(family: str) -> ModuleType:
    try:
        import triton
    except ImportError as error:
        raise RuntimeError(
            "dmax_kernels: no GPU kernels: the package was built without nvcc, and Triton is not "
            "installed (pip install triton)"
        ) from error
    check_triton_version(triton.__version__)
    return importlib.import_module(f"{__name__}.{family}")


def _checked(op: str, family: str) -> Callable:
    check = getattr(torch.ops.dmax, f"_check_{op}").default

    def call(*args, **kwargs):
        check(*args, **kwargs)
        return getattr(_load(family), op)(*args, **kwargs)

    call.__name__ = call.__qualname__ = op
    return call


IMPLEMENTATIONS: dict[str, Callable] = {
    op: _checked(op, family) for op, family in FAMILY_OF.items()
}
