"""Eqs. 8-10: the mix of token and mask embeddings, rescaled to the mix of their norms."""

import torch
from torch import Tensor


def hybrid_embedding(
    embedding: Tensor, token: Tensor, confidence: Tensor, masked: Tensor, mask_token_id: int
) -> Tensor:
    if token.dim() == masked.dim():
        token, confidence = token.unsqueeze(-1), confidence.unsqueeze(-1)  # [..., 1]
    e_mask = embedding[mask_token_id].float()  # [D]
    e_token = embedding[token].float()  # [..., k, D]
    p = confidence.float()
    p_mask = (1 - p.sum(dim=-1)).clamp(min=0)  # [...]; NaN stays NaN

    mix = (p.unsqueeze(-1) * e_token).sum(dim=-2) + p_mask.unsqueeze(-1) * e_mask
    target = (p * e_token.norm(dim=-1)).sum(dim=-1) + p_mask * e_mask.norm()
    norm = mix.norm(dim=-1)
    scale = torch.where(norm == 0, 0, target / norm.masked_fill(norm == 0, 1))
    hybrid = mix * scale.unsqueeze(-1)
    return torch.where(masked.unsqueeze(-1), e_mask, hybrid).to(embedding.dtype)
