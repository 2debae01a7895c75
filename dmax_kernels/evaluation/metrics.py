"""Accuracy under parallelism, and intervals for shares and for differences of paired shares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from dmax_kernels._checks import require

Z = 1.959963984540054  # of a two-sided interval of 95 %


def aup(
    parallelism: Sequence[float],
    accuracy: Sequence[float],
    best_accuracy: float | None = None,
    *,
    alpha: float = 3.0,
    tolerance: float = 5.0,
) -> float:
    """Accuracy under parallelism (d3LLM, arXiv 2601.07568), of one method on one task.

    With the points in ascending order of parallelism rho_i, and accuracies y_i in percent::

        AUP = rho_1 y_1 + sum_{i >= 2} (rho_i - rho_{i-1}) (y_i W(y_i) + y_{i-1} W(y_{i-1})) / 2
        W(y) = min(exp(-alpha (1 - y / y_max)), 1)

    Points with y_i < y_1 - tolerance are left out. d3LLM's own code also refuses a method whose
    last point is one of these; here it only gains nothing from them.

    Args:
        parallelism: tokens per forward pass of each point, positive.
        accuracy: the accuracy of each, in [0, 100].
        best_accuracy: y_max, the best accuracy of all methods that are compared; None for the best
            of these points.

    Raises:
        ValueError: no point, two lengths, a parallelism that is not positive, or an accuracy
            outside [0, 100].
    """
    require(len(accuracy) > 0, "aup: accuracy", "at least one point", "none")
    need = f"of as many points as accuracy, {len(accuracy)}"
    require(len(parallelism) == len(accuracy), "aup: parallelism", need, len(parallelism))
    for rho in parallelism:
        require(0 < rho < math.inf, "aup: parallelism", "positive", rho)
    for y in accuracy:
        require(0 <= y <= 100, "aup: accuracy", "a percentage in [0, 100]", y)
    if best_accuracy is None:
        best_accuracy = max(accuracy)
    require(0 <= best_accuracy <= 100, "aup: best_accuracy", "in [0, 100]", best_accuracy)
    points = sorted(zip(parallelism, accuracy, strict=True), key=lambda point: point[0])
    first = points[0][1]
    kept = [(rho, y) for rho, y in points if y >= first - tolerance]

    def weighed(y: float) -> float:
        if best_accuracy == 0:  # then y is 0 too
            return 0.0
        return y * min(math.exp(-alpha * (1 - y / best_accuracy)), 1.0)

    area = kept[0][0] * kept[0][1]
    for (rho, y), (next_rho, next_y) in pairwise(kept):
        area += (next_rho - rho) * (weighed(y) + weighed(next_y)) / 2
    return area


@dataclass(frozen=True)
class Paired:
    """How two rows differ on the same problems, as shares in [0, 1]: the first less the second."""

    difference: float
    low: float  # of the interval of 95 %
    high: float
    only_first: int  # problems that only the first got right
    only_second: int
    problems: int
    p_value: float  # McNemar's exact test


def paired(first: Sequence[bool], second: Sequence[bool]) -> Paired:
    """Compares two rows of one measure. If one has stopped early, its problems are compared.

    The difference is (b - c) / n, with b and c problems that only the one or only the other got
    right. Its interval is Agresti and Min's (2005): Wald's for paired shares, after half a problem
    is added to each of the four kinds, which keeps its width where b = c = 0. The p-value is
    McNemar's exact one: b of b + c, under equal chances.
    """
    n = min(len(first), len(second))
    require(n > 0, "paired: problems", "at least one that both rows have", n)
    pairs = list(zip(first[:n], second[:n], strict=True))
    only_first = sum(one and not other for one, other in pairs)
    only_second = sum(other and not one for one, other in pairs)
    b, c, total = only_first + 0.5, only_second + 0.5, n + 2
    half = Z * math.sqrt(b + c - (b - c) ** 2 / total) / total
    middle = (b - c) / total
    discordant = only_first + only_second
    fewer = min(only_first, only_second)
    ways = sum(math.comb(discordant, i) for i in range(fewer + 1))
    return Paired(
        difference=(only_first - only_second) / n,
        low=max(middle - half, -1.0),
        high=min(middle + half, 1.0),
        only_first=only_first,
        only_second=only_second,
        problems=n,
        p_value=min(1.0, 2 * ways / 2**discordant),
    )


def share_interval(right: int, problems: int) -> tuple[float, float]:
    """Wilson's interval of 95 % for a share, in [0, 1]."""
    share, square = right / problems, Z**2 / problems
    middle = (share + square / 2) / (1 + square)
    half = Z * math.sqrt(share * (1 - share) / problems + square / (4 * problems)) / (1 + square)
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))
