"""Most likely token and its probability, in one read of the logits."""

import torch
from torch import Tensor

from dmax_kernels.ops._register import register_fake, register_not_differentiable


def top1_confidence(
    logits: Tensor, *, temperature: float = 1.0, suppress_token: int = -1
) -> tuple[Tensor, Tensor]:
    """Top-1 prediction and confidence of every position (Algorithm 1, line 4).

    ``token = argmax_v logits[v]``, ``confidence = softmax(logits / temperature)[token]``.

    Args:
        logits: [..., V], float32, bfloat16 or float16, any strides.
        temperature: 1e-30 to 1e30. It scales the confidence; the token is the arg-max of the
            logits themselves.
        suppress_token: an id that gets neither chosen nor any probability (say, the mask token);
            -1 for none.

    Returns:
        token int64 [...] and confidence float32 [...]. Ties go to the lowest id. A NaN in the row:
        the first NaN's id, confidence NaN. A +inf: the first one's id, NaN. Nothing but -inf: id 0,
        NaN. The confidence is within 2e-6 of float64's, relatively, and the same row gives the same
        bits however many rows there are.

    Raises:
        RuntimeError: logits of another dtype or 0-D, a temperature or token id out of range.
    """
    return torch.ops.dmax.top1_confidence(
        logits, temperature=temperature, suppress_token=suppress_token
    )


@register_fake("top1_confidence")
def _(logits, *, temperature=1.0, suppress_token=-1):
    shape = logits.shape[:-1]
    return logits.new_empty(shape, dtype=torch.int64), logits.new_empty(shape, dtype=torch.float32)


register_not_differentiable("top1_confidence", "detach the logits")
