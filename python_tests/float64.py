"""The ops' values in float64, from the definitions: what the references are compared with."""

import torch
from torch import Tensor


def softmax_of(logits: Tensor, temperature: float = 1.0, suppress_token: int = -1) -> Tensor:
    x = logits.double()
    if suppress_token >= 0:
        x = x.clone()
        x[..., suppress_token] = -torch.inf
    return torch.softmax(x / temperature, dim=-1)


def top1_confidence(logits: Tensor, temperature: float = 1.0, suppress_token: int = -1):
    """Loops over the row: the first NaN, else the first maximum."""
    probability = softmax_of(logits, temperature, suppress_token)
    tokens = []
    for row in logits.reshape(-1, logits.shape[-1]).double().tolist():
        best, best_id = -torch.inf, 0
        for token, value in enumerate(row):
            if token == suppress_token:
                continue
            if value != value:
                best_id = token
                break
            if value > best:
                best, best_id = value, token
        tokens.append(best_id)
    top1 = torch.tensor(tokens, dtype=torch.int64).reshape(logits.shape[:-1])
    return top1, probability.gather(-1, top1.unsqueeze(-1)).squeeze(-1)


def row_statistics(logits: Tensor, temperature: float = 1.0, suppress_token: int = -1):
    """(token, confidence, runner_up, entropy, logsumexp). The entropy is summed from the
    differences to the maximum, without the winner, because -sum p log p would lose a sure row's
    digits.
    """
    token, confidence = top1_confidence(logits, temperature, suppress_token)
    x = logits.double() / temperature
    if suppress_token >= 0:
        x = x.clone()
        x[..., suppress_token] = -torch.inf
    best = token.unsqueeze(-1)
    below = (x - x.gather(-1, best)).scatter(-1, best, -torch.inf)
    weight = below.exp()
    rest = weight.sum(dim=-1)
    surprise = torch.where(weight == 0, 0.0, -below * weight).sum(dim=-1)
    undefined = confidence.isnan()
    runner_up = weight.amax(dim=-1) / (1 + rest)
    entropy = rest.log1p() + surprise / (1 + rest)
    return (
        token,
        confidence,
        runner_up.masked_fill(undefined, torch.nan),
        entropy.masked_fill(undefined, torch.nan),
        x.logsumexp(dim=-1),
    )


def token_loss(
    logits: Tensor, target: Tensor, label_smoothing: float = 0.0, z_loss: float = 0.0,
    temperature: float = 1.0,
) -> Tensor:  # fmt: skip
    x = logits.double() / temperature
    lse = x.logsumexp(dim=-1)
    loss = lse - x.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    loss = (1 - label_smoothing) * loss + label_smoothing * (lse - x.mean(dim=-1))
    return loss + z_loss * lse.square()
