"""One file per family of ops: the public functions with their maths, fake kernels and gradients."""

from dmax_kernels.ops import embedding, linear, loss, promote, sample, spd_step, statistics, top1
from dmax_kernels.ops.embedding import *
from dmax_kernels.ops.linear import *
from dmax_kernels.ops.loss import *
from dmax_kernels.ops.promote import *
from dmax_kernels.ops.sample import *
from dmax_kernels.ops.spd_step import *
from dmax_kernels.ops.statistics import *
from dmax_kernels.ops.top1 import *

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
