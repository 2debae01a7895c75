"""The expectation of the embedding under a row's softmax."""

import torch
from torch import Tensor


def per_row(temperature: float | Tensor) -> float | Tensor:
    """A temperature that divides logits [..., V]."""
    return temperature.unsqueeze(-1) if isinstance(temperature, Tensor) else temperature


def soft_embedding(
    logits: Tensor, embedding: Tensor, *, temperature: float | Tensor = 1.0
) -> Tensor:
    probability = torch.softmax(logits.float() / per_row(temperature), dim=-1)
    return (probability @ embedding.float()).to(embedding.dtype)


def soft_embedding_partial(
    logits_shard: Tensor, embedding_shard: Tensor, *, temperature: float | Tensor = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    x = logits_shard.float()
    maximum = x.amax(dim=-1)
    empty = maximum == -torch.inf
    weight = ((x - maximum.unsqueeze(-1)) / per_row(temperature)).exp()
    weight = weight.masked_fill(empty.unsqueeze(-1), 0)
    return maximum, weight.sum(dim=-1), weight @ embedding_shard.float()
