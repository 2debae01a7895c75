"""Triton kernels: every op for installs without nvcc, and the ops fused with the LM head.

One file per op. Each holds functions with the arguments and results of ``torch.ops.dmax.<op>``,
which trust their arguments; :data:`IMPLEMENTATIONS` lists them for the dispatcher, each behind the
check that the C++ kernels make (csrc/checks). Nothing here imports Triton before the first call of
an op, so that ``import dmax_kernels`` costs nothing where Triton is absent.
"""

import functools
import importlib
from collections.abc import Callable
from types import ModuleType

import torch

# The Triton that PyTorch 2.10, the oldest PyTorch the package supports, is shipped with
MINIMUM_TRITON = (3, 6)

# op -> the module of this folder that holds it
_MODULE_OF = {
    "top1_confidence": "top1_confidence",
    "topk_confidence": "topk_confidence",
    "prefix_promote": "prefix_promote",
    "hybrid_embedding": "hybrid_embedding",
    "hybrid_embedding_backward": "hybrid_embedding",
    "spd_step_": "spd_step_",
    "row_statistics": "row_statistics",
    "sample_tokens": "sample_tokens",
    "oput_loss": "oput_loss",
    "oput_loss_backward": "oput_loss",
    "oput_loss_and_grad_": "oput_loss",
    "top1_partial": "top1_partial",
    "top1_merge": "top1_merge",
    "sample_partial": "sample_partial",
    "sample_merge": "sample_merge",
    "linear_top1_confidence": "linear_top1_confidence",
    "linear_oput_loss": "linear_oput_loss",
    "linear_oput_loss_backward": "linear_oput_loss",
    "linear_sample_tokens": "linear_sample_tokens",
}


def check_triton_version(version: str) -> None:
    """Say which Triton is needed where the installed one is too old."""
    found = tuple(int(part) for part in version.split(".")[:2])
    if found < MINIMUM_TRITON:
        need = ".".join(map(str, MINIMUM_TRITON))
        raise RuntimeError(
            f"dmax_kernels: the Triton kernels need Triton {need} or newer, found {version}; "
            f"install PyTorch 2.10 or newer, or build dmax_kernels with nvcc"
        )


@functools.cache
def _load(module: str) -> ModuleType:
    try:
        import triton
    except ImportError as error:
        raise RuntimeError(
            "dmax_kernels: no GPU kernels: the package was built without nvcc, and Triton is not "
            "installed (pip install triton)"
        ) from error
    check_triton_version(triton.__version__)
    return importlib.import_module(f"{__name__}.{module}")


def _checked(op: str, module: str) -> Callable:
    check = getattr(torch.ops.dmax, f"_check_{op}").default

    def call(*args, **kwargs):
        check(*args, **kwargs)
        return getattr(_load(module), op)(*args, **kwargs)

    call.__name__ = call.__qualname__ = op
    return call


IMPLEMENTATIONS: dict[str, Callable] = {op: _checked(op, m) for op, m in _MODULE_OF.items()}
