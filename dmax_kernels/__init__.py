"""Kernels for DMax (arXiv 2604.08302): parallel decoding of diffusion language models.

The ops are functions of this module and, under the same names, ``torch.ops.dmax.*``; their
meaning in plain PyTorch is :mod:`dmax_kernels.reference`. ``python -m dmax_kernels info`` says
which backend serves each op on this machine.
"""

from dmax_kernels import _library

libraries = _library.load()

from dmax_kernels.ops import *  # noqa: E402, F403  (the schemas have to be loaded first)
from dmax_kernels.ops import __all__ as _ops  # noqa: E402

__version__ = "0.1.0"
__all__ = [*_ops, "__version__"]
