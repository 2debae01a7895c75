"""How autoregressive a decoding was: Global- and Local-ARness@k of the order tokens were committed.

Definitions: arXiv 2602.23225, section 3.2, Eqs. 2-3, after DiffuCoder (arXiv 2506.20639, section
4.1), which also has the local one. Both are 1 for strict left-to-right decoding.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from dmax_kernels._checks import one_of, read_integer, require
from dmax_kernels.decoding.trace import Trace

SCOPES = ("global", "local")
TIES = ("left", "fair")


def global_arness(order: Sequence[int], k: int = 1) -> float:
    """Share of commits that took one of the k leftmost positions still masked (Eq. 3).

    With p_1 ... p_L the committed positions and M_{c-1} what was masked before commit c::

        Global-ARness@k = 1/L sum_c [ p_c in smallest-k(M_{c-1}) ]

    Args:
        order: the positions in the order of their commits, each once (see `commit_order`).
        k: the window, at least 1.

    Returns:
        A number in [0, 1]; NaN for an empty order.

    Raises:
        ValueError: k below 1, or a position that occurs twice.
    """
    k = check_order("global_arness", order, k)
    masked, hits = sorted(order), 0
    for position in order:
        place = bisect_left(masked, position)
        hits += place < k
        del masked[place]
    return hits / len(order) if order else float("nan")


def fair_arness(steps: Sequence[Sequence[int]], k: int = 1) -> float:
    """Global-ARness@k where the commits of one step have no order: its mean over all their orders.

    Eq. 3 asks for one commit after another. A step that commits the set P out of the masked set M
    is counted as if it had committed P one by one in an order drawn uniformly. Position p of P then
    is among the k leftmost with probability::

        min(max(k - a_p, 0), b_p + 1) / (b_p + 1)     a_p = |{q in M \\ P : q < p}|
                                                      b_p = |{q in P : q < p}|

    because of the b_p positions of P to its left, 0 ... b_p are equally likely to be still masked.
    Where each step commits one position this is `global_arness`. A decoder that fills L positions
    in one step gets H_L / L at k = 1 (H_L the harmonic number), as a random order does, where
    counting from left to right gives it 1.

    Args:
        steps: the positions of each step's commits (see `commit_steps`).
        k: the window, at least 1.

    Returns:
        A number in [0, 1]; NaN where nothing is committed.

    Raises:
        ValueError: k below 1, or a position that occurs twice.
    """
    order = [position for step in steps for position in step]
    k = check_order("fair_arness", order, k)
    masked, hits = sorted(order), 0.0
    for step in steps:
        for before, position in enumerate(sorted(step)):
            others = bisect_left(masked, position) - before
            hits += min(max(k - others, 0), before + 1) / (before + 1)
        taken = set(step)
        masked = [position for position in masked if position not in taken]
    return hits / len(order) if order else float("nan")


def local_arness(order: Sequence[int], k: int = 1) -> float:
    """Share of commits that continue a run: each of the last k + 1 directly after the one before.

    Over c = k + 1 ... L, with p as in `global_arness`::

        Local-ARness@k = 1/(L - k) sum_c [ p_{c-i} = p_c - i for all i = 1 ... k ]

    Returns NaN when the order has no k + 1 commits. Raises as `global_arness`.
    """
    k = check_order("local_arness", order, k)
    run, hits = 0, 0
    for before, position in pairwise(order):
        run = run + 1 if position == before + 1 else 0
        hits += run >= k
    return hits / (len(order) - k) if len(order) > k else float("nan")


def commit_steps(row: Mapping[str, Any], end: int | None = None) -> list[list[int]]:
    """The positions that left the mask in each step of one row, from left to right.

    A later revision of a token is not a commit.

    Args:
        row: one of `Trace.to_dict()["rows"]`.
        end: leave out this position and later ones (say, those after the end of sequence).
    """
    return [
        [
            j + block["start"]
            for j in sorted(step["promoted"])
            if end is None or j < end - block["start"]
        ]
        for block in row["blocks"]
        for step in block["steps"]
    ]


def commit_order(row: Mapping[str, Any], end: int | None = None) -> list[int]:
    """Positions of one row of `Trace.to_dict()["rows"]` in the order in which they left the mask.

    Positions that leave it in the same step count from left to right. The paper, which defines the
    measure for one commit after another, does not say which of them is first. In this order the
    Global-ARness of a left-to-right decoder is 1 however many tokens it takes at once, but so is
    that of a decoder that fills all of its block in one step; `fair_arness` tells them apart. The
    arguments are those of `commit_steps`.
    """
    return [position for step in commit_steps(row, end) for position in step]


def arness(
    trace: Trace | Mapping[str, Any],
    k: int = 1,
    *,
    scope: str = "global",
    ties: str = "left",
    ends: Sequence[int] | None = None,
) -> list[float]:
    """Global- or Local-ARness@k of every row of a trace.

    Args:
        trace: a `Trace`, or what its `to_dict` returned.
        k: the window, at least 1.
        scope: "global" (Eq. 3) or "local".
        ties: how the commits of one step are counted. "left": from left to right (`commit_order`).
            "fair", with scope "global": the mean over all of their orders (`fair_arness`).
        ends: for each row the position to stop at: its prompt's length plus `num_tokens`, if
            tokens after the end of sequence should not count. Default: all positions.

    Raises:
        ValueError: an unknown scope, k below 1, fair ties with the local scope, or not one end for
            each row.
    """
    require(scope in SCOPES, "arness: scope", one_of(SCOPES), repr(scope))
    allowed = TIES if scope == "global" else TIES[:1]
    require(ties in allowed, "arness: ties", f"{one_of(allowed)} with scope {scope!r}", repr(ties))
    rows = (trace.to_dict() if isinstance(trace, Trace) else trace)["rows"]
    if ends is not None and len(ends) != len(rows):
        raise ValueError(
            f"arness: ends must be one position for each of {len(rows)} rows, got {len(ends)}"
        )
    stops = [None] * len(rows) if ends is None else ends
    if ties == "fair":
        return [
            fair_arness(commit_steps(row, stop), k) for row, stop in zip(rows, stops, strict=True)
        ]
    measure = {"global": global_arness, "local": local_arness}[scope]
    return [measure(commit_order(row, stop), k) for row, stop in zip(rows, stops, strict=True)]


def check_order(function: str, order: Sequence[int], k: int) -> int:
    """k as a Python int, if it and the order are right."""
    window = read_integer(f"{function}: k", k, "a positive integer")
    if len(set(order)) != len(order):
        raise ValueError(f"{function}: order must name each position once, got {list(order)}")
    return window
