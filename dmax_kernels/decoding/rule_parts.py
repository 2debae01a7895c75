"""What decoding rules are made of: checked options, ranks, and the progress rule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dmax_kernels._checks import read_integer, read_number
from dmax_kernels.decoding.step import ComposedRule, Rule, Seen


@dataclass(frozen=True)
class FixedCount(ComposedRule):
    """A rule that promotes a fixed number of tokens per step. It reads no threshold."""

    tokens_per_step: int = 1

    def __post_init__(self) -> None:
        keep_integer(self, "tokens_per_step", "a positive integer")


def above_threshold(seen: Seen) -> Tensor:
    """Every masked position with c > tau_dec, or the most confident one."""
    confident = seen.confidence > seen.tau_dec
    return or_best(seen.masked & confident, seen.confidence, seen.masked)


def or_best(promoted: Tensor, score: Tensor, masked: Tensor) -> Tensor:
    """`promoted`, or a row's best masked position where that is nothing: a step must advance."""
    key = sort_key(score, masked)
    is_best = key == key.amax(dim=-1, keepdim=True)
    best = masked & is_best & (is_best.cumsum(dim=-1) == 1)
    return torch.where(promoted.any(dim=-1, keepdim=True), promoted, best)


def best_of_groups(
    score: Tensor, masked: Tensor, count: int, group: Tensor | None = None
) -> Tensor:
    """The `count` masked positions of highest score, of the row or of each group of positions.

    A NaN is taken only where its row or group has no number: the leftmost.
    """
    rank = rank_within(score, masked, group)
    return masked & (((rank < count) & ~score.isnan()) | (rank == 0))


def best_in_turns(score: Tensor, masked: Tensor, count: int, group: Tensor) -> Tensor:
    """The `count` masked positions that are due when the groups of positions take turns.

    In each turn every group decodes one position, its best; within a turn the groups go from left
    to right. How many positions of a group are decoded says which turn it is at. A step therefore
    goes on exactly where the one before it stopped, however `count` divides the groups, and a group
    that is full leaves its share to the others.

    A NaN is taken only where nothing else is masked: the leftmost.
    """
    first = score.masked_fill(~masked, torch.inf)  # what is decoded had the turns before
    turn = rank_within(first, torch.ones_like(masked), group)
    return best_of_groups((-turn).float().masked_fill(score.isnan(), torch.nan), masked, count)


def rank_within(score: Tensor, masked: Tensor, group: Tensor | None = None) -> Tensor:
    """Rank of every masked position by descending score, 0 for the best; in its group if given.

    NaN scores come last of the masked; positions that are not masked rank after all of these. Two
    stable sorts, by score and then by group, because argmax leaves ties open on a GPU.
    """
    order = sort_key(score, masked).argsort(dim=-1, descending=True, stable=True)
    place = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    if group is not None:
        group, by_group = group.expand_as(order).gather(-1, order).sort(dim=-1, stable=True)
        order = order.gather(-1, by_group)
        is_first = F.pad(group[..., 1:] != group[..., :-1], (1, 0), value=True)
        place = place - (place * is_first).cummax(dim=-1).values
    return torch.empty_like(order).scatter_(-1, order, place)


def sort_key(score: Tensor, masked: Tensor) -> Tensor:
    """score with NaN below every number, and positions that are not masked below NaN."""
    lowest = torch.finfo(score.dtype).min
    return score.nan_to_num(nan=lowest, neginf=lowest).masked_fill(~masked, -torch.inf)


def keep_number(rule: Rule, name: str, need: str, accepts: Callable[[float], bool]) -> None:
    """Check an option that is a number, and keep it as a Python float."""
    what = f"{type(rule).__name__}: {name}"
    value = read_number(what, getattr(rule, name), f"a number, {need}", accepts)
    object.__setattr__(rule, name, value)  # the rules are frozen


def keep_integer(rule: Rule, name: str, need: str, **bounds: int) -> None:
    """Check an option that is an integer, and keep it as a Python int."""
    value = read_integer(f"{type(rule).__name__}: {name}", getattr(rule, name), need, **bounds)
    object.__setattr__(rule, name, value)
