"""Whether a peer's results are those of eager: loosely, since each rounds in its own places."""

from __future__ import annotations

from typing import Any

import torch

from dmax_kernels.bench.draws import sorted_and_masked

ROWS = 64  # of logits that a check looks at
TOLERANCE = 0.03  # relative: some round probabilities or gradients to bfloat16 on the way
DEVIATIONS = 6.0  # of the mean log-probability of the draws


def why_off(workload: str, given: dict[str, Any], eager: Any, found: Any) -> str:
    """What is wrong with `found`, or nothing."""
    if "sample" in workload:
        token = found[0] if isinstance(found, tuple) else found
        return why_not_drawn(logits_of(given), token[:ROWS].long(), given.get("options", {}))
    if "loss" in workload:
        if len(found) != len(eager):
            return f"{len(found)} results, not {len(eager)}"
        return "; ".join(filter(None, map(distance, ("first", "second", "third"), found, eager)))
    if reason := distance("probability", found[0], eager[0]):
        return reason
    probability = torch.softmax(logits_of(given), dim=-1)
    token = found[1][:ROWS].long().reshape(len(probability), -1)
    if token.min() < 0 or token.max() >= probability.shape[-1]:
        return "a token outside the vocabulary"
    return distance(
        "token's probability",
        probability.gather(-1, token),
        probability.topk(token.shape[-1], dim=-1).values,
    )


def logits_of(given: dict[str, Any]) -> torch.Tensor:
    """The first rows, in float32."""
    if "hidden" in given:
        return (given["hidden"][:ROWS] @ given["weight"].t()).float()
    return given["logits"][:ROWS].float()


def distance(name: str, found: torch.Tensor, eager: torch.Tensor) -> str:
    if found.shape != eager.shape:
        return f"{name} result has the shape {tuple(found.shape)}, not {tuple(eager.shape)}"
    off = torch.linalg.vector_norm(found.float() - eager.float())
    off = (off / torch.linalg.vector_norm(eager.float())).item()
    return "" if off <= TOLERANCE else f"{name} result differs by {off:.3g} of its size"


def why_not_drawn(logits: torch.Tensor, token: torch.Tensor, options: dict[str, Any]) -> str:
    """Draws follow the probabilities: none that the filters drop, and a likely mean of their
    logarithms. A filter's edge may lie a rounding further out."""
    edge = {"top_p": options.get("top_p", 1.0) + 0.005, "min_p": options.get("min_p", 0.0) * 0.98}
    if token.min() < 0 or token.max() >= logits.shape[-1]:
        return "a token outside the vocabulary"
    kept = sorted_and_masked(logits, **(options | edge))
    logarithm = torch.log_softmax(kept, dim=-1)
    drawn = logarithm.gather(-1, token.unsqueeze(-1)).squeeze(-1)
    if drawn.isinf().any():
        return "a token that the filters drop"
    probability = logarithm.exp()
    logarithm = logarithm.masked_fill(probability == 0, 0)
    mean = (probability * logarithm).sum(dim=-1)
    variance = (probability * logarithm**2).sum(dim=-1) - mean**2
    off = (drawn - mean).sum().abs() - 1e-3 * len(drawn)
    if off > DEVIATIONS * variance.clamp(min=0).sum().sqrt():
        return "draws that do not follow the probabilities"
    return ""
