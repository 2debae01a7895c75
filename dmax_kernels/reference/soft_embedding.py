"""The expectation of the embedding under a row's softmax, and the cut to its probable tokens."""

import torch
from torch import Tensor

from dmax_kernels.ops.soft_embedding import TopPCut
from dmax_kernels.reference.sample import kept_tokens
from dmax_kernels.reference.top1 import per_row


def soft_embedding(
    logits: Tensor, embedding: Tensor, *, temperature: float | Tensor = 1.0, top_p: float = 1.0
) -> Tensor:
    x = kept_logits(logits, top_p_cut(logits, top_p, temperature=temperature))
    probability = torch.softmax(x / per_row(temperature), dim=-1)
    return (probability @ embedding.float()).to(embedding.dtype)


def soft_embedding_partial(
    logits_shard: Tensor,
    embedding_shard: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    cut: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    x = logits_shard.float() if cut is None else kept_logits(logits_shard, cut)
    maximum = x.amax(dim=-1)
    empty = maximum == -torch.inf
    weight = ((x - maximum.unsqueeze(-1)) / per_row(temperature)).exp()
    weight = weight.masked_fill(empty.unsqueeze(-1), 0)
    return maximum, weight.sum(dim=-1), weight @ embedding_shard.float()


def top_p_cut(logits: Tensor, top_p: float, *, temperature: float | Tensor = 1.0) -> TopPCut:
    x, rows = logits.float(), logits.shape[:-1]
    t = torch.as_tensor(temperature, dtype=torch.float32, device=x.device).expand(rows)
    off, share = (torch.full((*rows, 1), option, device=x.device) for option in (0.0, top_p))
    kept = kept_tokens(x, t.unsqueeze(-1), off, share, off)
    least = x.masked_fill(~kept, torch.inf).amin(dim=-1)
    ids = torch.arange(x.shape[-1], device=x.device)
    last_id = ids.masked_fill(~(kept & (x == least.unsqueeze(-1))), -1).amax(dim=-1)
    whole = ~x.amax(dim=-1).isfinite() | (share.squeeze(-1) == 1)
    return TopPCut(
        torch.where(whole, -torch.inf, least), torch.where(whole, x.shape[-1] - 1, last_id)
    )


def kept_logits(logits: Tensor, cut: tuple[Tensor, Tensor]) -> Tensor:
    """float32 logits with -inf at what the cut drops."""
    x = logits.float()
    least, last_id = (each.unsqueeze(-1) for each in cut)
    ids = torch.arange(x.shape[-1], device=x.device)
    return x.masked_fill((x < least) | ((x == least) & (ids > last_id)), -torch.inf)
