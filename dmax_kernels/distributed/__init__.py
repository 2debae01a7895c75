"""The ops over a vocabulary that is sharded among the ranks of a ``torch.distributed`` group.

Each rank passes its columns of the logits (or rows of the LM head or embedding table) and what is
replicated: hidden states, seeds, targets. Every rank returns the same result. Most ops cost one
small collective forward, and at most one backward; where one needs more, its docstring counts them.

Common arguments:

- the sharded tensor: a plain tensor, or a DTensor sharded on its vocabulary dimension, which brings
  its group, widths and vocabulary size with it;
- ``group``: a ProcessGroup, or None for the default one. Without an initialised process group there
  is one rank, and the functions are those of :mod:`dmax_kernels`;
- ``shard_sizes``: the width of every rank's shard, in rank order; None where all are as wide as
  this one. :func:`gather_shard_sizes` asks the ranks once;
- ``vocab_size``: ids at and above it do not exist (padding); None for the sum of the widths. A rank
  may hold nothing but padding, or nothing at all.

On the CPU it is an error if a rank's widths or dtype contradict the others'. On a GPU that check
would cost a host sync in every call; call :func:`gather_shard_sizes` once instead.
"""

from dmax_kernels.distributed.decoding import (
    linear_sample_tokens,
    linear_top1_confidence,
    sample_tokens,
    top1_confidence,
)
from dmax_kernels.distributed.hybrid_embedding import hybrid_embedding
from dmax_kernels.distributed.layout import gather_shard_sizes
from dmax_kernels.distributed.oput_loss import linear_oput_loss, oput_loss
from dmax_kernels.distributed.soft_embedding import soft_embedding
from dmax_kernels.distributed.statistics import row_statistics, topk_confidence
from dmax_kernels.distributed.target_logprobs import linear_target_logprobs, target_logprobs
from dmax_kernels.distributed.token_logprobs import linear_token_logprobs, token_logprobs

__all__ = [
    "gather_shard_sizes",
    "hybrid_embedding",
    "linear_oput_loss",
    "linear_sample_tokens",
    "linear_target_logprobs",
    "linear_token_logprobs",
    "linear_top1_confidence",
    "oput_loss",
    "row_statistics",
    "sample_tokens",
    "soft_embedding",
    "target_logprobs",
    "token_logprobs",
    "top1_confidence",
    "topk_confidence",
]
