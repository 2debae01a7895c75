"""Most likely token and its probability from the hidden state: the logits are never stored."""

import torch
from torch import Tensor

from dmax_kernels.ops._register import register_fake, register_not_differentiable


def linear_top1_confidence(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float = 1.0,
    suppress_token: int = -1,
) -> tuple[Tensor, Tensor]:
    """:func:`dmax_kernels.top1_confidence` of ``hidden @ weight.T + bias`` (Algorithm 1, line 4).

    ``x = hidden @ weight.T + bias``, ``token = argmax_v x_v``,
    ``confidence = softmax(x / temperature)[token]``. The products of the inputs' dtype are summed
    in float32 and the logits stay float32: a 16-bit LM head rounds them, so ids may differ from its
    where two logits round to the same number. Memory beside the results: below 8 MB on the GPU; on
    the CPU at D = 2,048 below 5 MB, and 1 MB per thread, whatever V.

    Args:
        hidden: [..., D], float32, bfloat16 or float16. Pass only the rows wanted.
        weight: [V, D], the LM head, in hidden's dtype.
        bias: [V] in hidden's dtype, or None.
        temperature, suppress_token: as in :func:`dmax_kernels.top1_confidence`.

    Returns:
        token int64 [...] and confidence float32 [...]; ties, NaN and infinities as in
        :func:`dmax_kernels.top1_confidence`. Repeated calls give the same bits. On the CPU a row's
        bits depend neither on the other rows nor on the number of threads; on the GPU another
        number of rows may be another order of summation within the matrix product.

    Raises:
        RuntimeError: dtypes or shapes that do not fit, a temperature or token id out of range.
    """
    return torch.ops.dmax.linear_top1_confidence(
        hidden, weight, bias, temperature=temperature, suppress_token=suppress_token
    )


@register_fake("linear_top1_confidence")
def _(hidden, weight, bias=None, *, temperature=1.0, suppress_token=-1):
    shape = hidden.shape[:-1]
    return hidden.new_empty(shape, dtype=torch.int64), hidden.new_empty(shape, dtype=torch.float32)


register_not_differentiable("linear_top1_confidence", "detach the hidden states and the weight")
