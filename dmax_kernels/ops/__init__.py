"""One file per op: the public function with its maths, its fake kernel, its gradient."""

from dmax_kernels.ops.hybrid_embedding import hybrid_embedding
from dmax_kernels.ops.linear_sample_tokens import linear_sample_tokens
from dmax_kernels.ops.linear_top1_confidence import linear_top1_confidence
from dmax_kernels.ops.oput_loss import oput_loss, oput_loss_and_grad_
from dmax_kernels.ops.prefix_promote import prefix_promote
from dmax_kernels.ops.row_statistics import RowStatistics, row_statistics
from dmax_kernels.ops.sample_tokens import sample_tokens
from dmax_kernels.ops.spd_step_ import spd_step_
from dmax_kernels.ops.top1_confidence import top1_confidence
from dmax_kernels.ops.top1_merge import top1_merge
from dmax_kernels.ops.top1_partial import top1_partial
from dmax_kernels.ops.topk_confidence import topk_confidence

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
