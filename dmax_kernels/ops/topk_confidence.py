"""The k most likely tokens and their probabilities."""

import torch
from torch import Tensor

from dmax_kernels.ops._register import register_fake, register_not_differentiable


def topk_confidence(
    logits: Tensor, k: int, *, temperature: float = 1.0, suppress_token: int = -1
) -> tuple[Tensor, Tensor]:
    """The k largest of ``softmax(logits / temperature)``, for top-k hybrid embeddings.

    Args:
        logits: [..., V], float32, bfloat16 or float16, any strides.
        k: 1..8, at most V.
        temperature, suppress_token: as in :func:`dmax_kernels.top1_confidence`; a suppressed token
            ranks with the -inf.

    Returns:
        tokens int64 [..., k] and confidences float32 [..., k], descending; equal logits by
        ascending id, NaN before all. Where the row has a NaN, a +inf, or nothing but -inf, all of
        its confidences are NaN.

    Raises:
        RuntimeError: wrong dtype or shape, k, temperature or token id out of range.
    """
    return torch.ops.dmax.topk_confidence(
        logits, k, temperature=temperature, suppress_token=suppress_token
    )


@register_fake("topk_confidence")
def _(logits, k, *, temperature=1.0, suppress_token=-1):
    shape = (*logits.shape[:-1], k)
    return logits.new_empty(shape, dtype=torch.int64), logits.new_empty(shape, dtype=torch.float32)


register_not_differentiable("topk_confidence", "detach the logits")
