"""A sample and its probability, from the hidden state and the LM head."""

from torch import Tensor

from dmax_kernels.reference.linear_top1_confidence import linear_logits
from dmax_kernels.reference.sample import sample_tokens


def linear_sample_tokens(
    hidden: Tensor,
    weight: Tensor,
    seed: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float = 1.0,
    suppress_token: int = -1,
) -> tuple[Tensor, Tensor]:
    logits = linear_logits(hidden, weight, bias)
    return sample_tokens(logits, seed, temperature=temperature, suppress_token=suppress_token)
