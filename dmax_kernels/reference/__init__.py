"""The meaning of every op, in eager float32 PyTorch, with the signatures of :mod:`dmax_kernels`.

These functions are what the tests and the benchmarks compare with. They are plain on purpose: no
fusion, no tricks, any device. Nothing in the package falls back to them silently; the loops use
them when asked with ``ops="reference"``.
"""

from dmax_kernels.reference import (
    embedding,
    linear,
    loss,
    promote,
    sample,
    spd_step,
    statistics,
    top1,
)
from dmax_kernels.reference.embedding import *
from dmax_kernels.reference.linear import *
from dmax_kernels.reference.loss import *
from dmax_kernels.reference.promote import *
from dmax_kernels.reference.sample import *
from dmax_kernels.reference.spd_step import *
from dmax_kernels.reference.statistics import *
from dmax_kernels.reference.top1 import *

__all__ = [
    *embedding.__all__,
    *linear.__all__,
    *loss.__all__,
    *promote.__all__,
    *sample.__all__,
    *spd_step.__all__,
    *statistics.__all__,
    *top1.__all__,
]
