"""One vocabulary shard's contribution to the top-1 and its confidence."""

import torch
from torch import Tensor

from dmax_kernels.reference.top1_confidence import visible_logits


def top1_partial(
    logits_shard: Tensor, vocab_start: int, *, temperature: float = 1.0, suppress_token: int = -1
) -> tuple[Tensor, Tensor, Tensor]:
    shard_size = logits_shard.shape[-1]
    local = suppress_token - vocab_start
    on_shard = suppress_token >= 0 and 0 <= local < shard_size
    visible = visible_logits(logits_shard, local if on_shard else -1)
    local_token = visible.argmax(dim=-1, keepdim=True)
    largest = visible.gather(-1, local_token)
    sum_exp = torch.exp((visible - largest) / temperature).sum(dim=-1)
    maximum = (largest / temperature).squeeze(-1)
    # exp(-inf - -inf) is NaN, but a shard of nothing but -inf holds no mass
    sum_exp = torch.where(maximum == -torch.inf, 0.0, sum_exp)
    return maximum, sum_exp, local_token.squeeze(-1) + vocab_start
