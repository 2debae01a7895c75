"""How autoregressive a decoding was: Global- and Local-ARness@k of the order tokens were committed.

Definitions: arXiv 2602.23225, section 3.2, Eqs. 2-3, after DiffuCoder (arXiv 2506.20639, section
4.1), which also has the local one. Both are 1 for strict left-to-right decoding.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from dmax_kernels._checks import read_integer
from dmax_kernels.decoding.trace import Trace

SCOPES = ("global", "local")


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


def commit_order(row: Mapping[str, Any], end: int | None = None) -> list[int]:
    """Positions of one row of `Trace.to_dict()["rows"]` in the order in which they left the mask.

    Positions that leave it in the same step count from left to right. The paper, which commits one
    token per step, does not say which of them is first; in this order the Global-ARness of a
    left-to-right decoder is 1 however many tokens it takes at once. The measure is then about order
    alone, and tokens per forward pass says how parallel a decoding is. A later revision of a token
    is not a commit.

    Args:
        row: as `Trace.to_dict` writes it.
        end: leave out this position and later ones (say, those after the end of sequence).
    """
    return [
        block["start"] + j
        for block in row["blocks"]
        for step in block["steps"]
        for j in sorted(step["promoted"])
        if end is None or block["start"] + j < end
    ]


def arness(
    trace: Trace | Mapping[str, Any],
    k: int = 1,
    *,
    scope: str = "global",
    ends: Sequence[int] | None = None,
) -> list[float]:
    """Global- or Local-ARness@k of every row of a trace.

    Args:
        trace: a `Trace`, or what its `to_dict` returned.
        k: the window, at least 1.
        scope: "global" (Eq. 3) or "local".
        ends: for each row the position to stop at: its prompt's length plus `num_tokens`, if
            tokens after the end of sequence should not count. Default: all positions.

    Raises:
        ValueError: an unknown scope, k below 1, or not one end for each row.
    """
    if scope not in SCOPES:
        raise ValueError(f"arness: scope must be 'global' or 'local', got {scope!r}")
    rows = (trace.to_dict() if isinstance(trace, Trace) else trace)["rows"]
    if ends is not None and len(ends) != len(rows):
        raise ValueError(
            f"arness: ends must be one position for each of {len(rows)} rows, got {len(ends)}"
        )
    measure = {"global": global_arness, "local": local_arness}[scope]
    stops = [None] * len(rows) if ends is None else ends
    return [measure(commit_order(row, stop), k) for row, stop in zip(rows, stops, strict=True)]


def check_order(function: str, order: Sequence[int], k: int) -> int:
    """k as a Python int, if it and the order are right."""
    window = read_integer(f"{function}: k", k, "a positive integer")
    if len(set(order)) != len(order):
        raise ValueError(f"{function}: order must name each position once, got {list(order)}")
    return window
