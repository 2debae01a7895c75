"""The soft state between mask and token."""

import torch
from torch import Tensor

from dmax_kernels.ops._register import (
    register_autograd,
    register_fake,
    register_not_differentiable,
)


def hybrid_embedding(
    embedding: Tensor, token: Tensor, confidence: Tensor, masked: Tensor, mask_token_id: int
) -> Tensor:
    """Input embeddings of a block: e(mask) where masked, else the hybrid of Eqs. 8-10.

    With p_j the confidence of token y_j and the residual r = max(1 - sum_j p_j, 0)::

        mix = sum_j p_j e(y_j) + r e(mask)
        h   = mix / |mix| * (sum_j p_j |e(y_j)| + r |e(mask)|)        (0 where mix is 0)

    float32 inside, rounded once to the embedding's dtype. A single token with confidence 1 gives
    e(y) exactly. A row is NaN where a confidence, an element of e(mask) or one of some e(y_j) is
    NaN or infinite, whatever its weight: 0 * inf is NaN.

    Args:
        embedding: [V, D], float32, bfloat16 or float16.
        token: int64 or int32, [...] or [..., k] with k in 1..8 (top-k hybrids); each inside [0, V)
            wherever ``masked`` is False.
        confidence: float32, token's shape.
        masked: bool [...].
        mask_token_id: in [0, V).

    Returns:
        [..., D] in the embedding's dtype. Differentiable in ``embedding`` (a dense gradient, summed
        in float32 in a fixed order) and in ``confidence``.

    Raises:
        RuntimeError: wrong dtypes or shapes, an id outside the vocabulary.
    """
    return torch.ops.dmax.hybrid_embedding(embedding, token, confidence, masked, mask_token_id)


@register_fake("hybrid_embedding")
def _(embedding, token, confidence, masked, mask_token_id):
    return embedding.new_empty((*masked.shape, embedding.shape[1]))


@register_fake("hybrid_embedding_backward")
def _(grad_output, embedding, token, confidence, masked, mask_token_id):
    return embedding.new_empty(embedding.shape), confidence.new_empty(confidence.shape)


def _setup_context(ctx, inputs, options, output):
    embedding, token, confidence, masked, ctx.mask_token_id = inputs
    ctx.save_for_backward(embedding, token, confidence, masked)


def _backward(ctx, grad_output):
    grad_embedding, grad_confidence = torch.ops.dmax.hybrid_embedding_backward(
        grad_output, *ctx.saved_tensors, ctx.mask_token_id
    )
    return grad_embedding, None, grad_confidence, None, None


register_autograd("hybrid_embedding", _backward, _setup_context)
register_not_differentiable("hybrid_embedding_backward", "second derivatives are not there")
