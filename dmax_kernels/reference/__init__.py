"""The meaning of every op, in eager float32 PyTorch, with the signatures of :mod:`dmax_kernels`.

These functions are what the tests and the benchmarks compare with. They are plain on purpose: no
fusion, no tricks, any device. Nothing in the package falls back to them silently; the loops use
them when asked with ``ops="reference"``.
"""

from dmax_kernels.reference.hybrid_embedding import hybrid_embedding
from dmax_kernels.reference.linear_sample_tokens import linear_sample_tokens
from dmax_kernels.reference.linear_top1_confidence import linear_top1_confidence
from dmax_kernels.reference.oput_loss import oput_loss, oput_loss_and_grad_
from dmax_kernels.reference.prefix_promote import prefix_promote
from dmax_kernels.reference.row_statistics import RowStatistics, row_statistics
from dmax_kernels.reference.sample_tokens import sample_tokens
from dmax_kernels.reference.spd_step_ import spd_step_
from dmax_kernels.reference.top1_confidence import top1_confidence
from dmax_kernels.reference.top1_merge import top1_merge
from dmax_kernels.reference.top1_partial import top1_partial
from dmax_kernels.reference.topk_confidence import topk_confidence

__all__ = [
    "RowStatistics",
    "hybrid_embedding",
    "linear_sample_tokens",
    "linear_top1_confidence",
    "oput_loss",
    "oput_loss_and_grad_",
    "prefix_promote",
    "row_statistics",
    "sample_tokens",
    "spd_step_",
    "top1_confidence",
    "top1_merge",
    "top1_partial",
    "topk_confidence",
]
