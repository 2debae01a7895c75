"""The meaning of every op, in eager float32 PyTorch, with the signatures of :mod:`dmax_kernels`.

These functions are what the tests and the benchmarks compare with. They are plain on purpose: no
fusion, no tricks, any device. Nothing in the package falls back to them silently; the loops use
them when asked with ``ops="reference"``.
"""

from dmax_kernels.reference.edit_step import edit_step_
from dmax_kernels.reference.embedding import hybrid_embedding
from dmax_kernels.reference.linear import (
    linear_oput_loss,
    linear_sample_tokens,
    linear_token_logprobs,
    linear_top1_confidence,
)
from dmax_kernels.reference.logprobs import TokenLogprobs, token_logprobs
from dmax_kernels.reference.loss import oput_loss, oput_loss_and_grad_
from dmax_kernels.reference.promote import prefix_promote
from dmax_kernels.reference.sample import Sample, sample_merge, sample_partial, sample_tokens
from dmax_kernels.reference.soft_embedding import (
    TopPCut,
    soft_embedding,
    soft_embedding_partial,
    top_p_cut,
)
from dmax_kernels.reference.spd_step import spd_step_
from dmax_kernels.reference.statistics import RowStatistics, row_statistics
from dmax_kernels.reference.target_logprobs import (
    TargetLogprobs,
    certainty_forcing_loss,
    linear_certainty_forcing_loss,
    linear_target_logprobs,
    target_logprobs,
)
from dmax_kernels.reference.top1 import top1_confidence, top1_merge, top1_partial, topk_confidence
from dmax_kernels.reference.transform import transform_logits_

__all__ = [
    "RowStatistics",
    "Sample",
    "TargetLogprobs",
    "TokenLogprobs",
    "TopPCut",
    "certainty_forcing_loss",
    "edit_step_",
    "hybrid_embedding",
    "linear_certainty_forcing_loss",
    "linear_oput_loss",
    "linear_sample_tokens",
    "linear_target_logprobs",
    "linear_token_logprobs",
    "linear_top1_confidence",
    "oput_loss",
    "oput_loss_and_grad_",
    "prefix_promote",
    "row_statistics",
    "sample_merge",
    "sample_partial",
    "sample_tokens",
    "soft_embedding",
    "soft_embedding_partial",
    "spd_step_",
    "target_logprobs",
    "token_logprobs",
    "top1_confidence",
    "top1_merge",
    "top1_partial",
    "top_p_cut",
    "topk_confidence",
    "transform_logits_",
]
