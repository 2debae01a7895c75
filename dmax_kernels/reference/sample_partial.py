"""One vocabulary shard's part of a Gumbel-max sample."""

import torch
from torch import Tensor

from dmax_kernels.reference.sample import exponential_noise
from dmax_kernels.reference.top1 import visible_logits
from dmax_kernels.reference.top1_partial import local_suppress_token, top1_partial


def sample_partial(
    logits_shard: Tensor,
    seed: Tensor,
    vocab_start: int,
    *,
    temperature: float = 1.0,
    suppress_token: int = -1,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    maximum, sum_exp, first = top1_partial(
        logits_shard, vocab_start, temperature=temperature, suppress_token=suppress_token
    )
    local = local_suppress_token(logits_shard, vocab_start, suppress_token)
    visible = visible_logits(logits_shard, local)
    noise = exponential_noise(seed, visible.shape[:-1], visible.shape[-1], vocab_start)
    perturbed = visible / temperature - noise.log()
    sampled = perturbed.argmax(dim=-1, keepdim=True)
    logit = visible.gather(-1, sampled).squeeze(-1)
    # NaN, +inf and all -inf: the shard's top-1, which is also what its score says
    defined = maximum.isfinite()
    token = torch.where(defined, sampled.squeeze(-1) + vocab_start, first)
    score = torch.where(defined, perturbed.gather(-1, sampled).squeeze(-1), maximum)
    weight = torch.exp((logit - maximum) / temperature)
    weight = torch.where(maximum == -torch.inf, 0.0, torch.where(defined, weight, torch.nan))
    return maximum, sum_exp, token, score, weight
