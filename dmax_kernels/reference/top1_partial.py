"""One vocabulary shard's contribution to the top-1 and its confidence."""

import torch
from torch import Tensor

from dmax_kernels.reference.top1 import visible_logits


def local_suppress_token(logits_shard: Tensor, vocab_start: int, suppress_token: int) -> int:
    """The suppressed id's place on the shard, -1 where it lies elsewhere."""
    local = suppress_token - vocab_start
    return local if suppress_token >= 0 and 0 <= local < logits_shard.shape[-1] else -1


def top1_partial(
    logits_shard: Tensor, vocab_start: int, *, temperature: float = 1.0, suppress_token: int = -1
) -> tuple[Tensor, Tensor, Tensor]:
    local = local_suppress_token(logits_shard, vocab_start, suppress_token)
    visible = visible_logits(logits_shard, local)
    local_token = visible.argmax(dim=-1, keepdim=True)
    largest = visible.gather(-1, local_token)
    sum_exp = torch.exp((visible - largest) / temperature).sum(dim=-1)
    maximum = largest.squeeze(-1)
    # exp(-inf - -inf) is NaN, but a shard of nothing but -inf holds no mass
    sum_exp = torch.where(maximum == -torch.inf, 0.0, sum_exp)
    return maximum, sum_exp, local_token.squeeze(-1) + vocab_start
