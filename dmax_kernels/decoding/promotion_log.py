"""How many positions of each row left the mask at each of its steps."""

from __future__ import annotations

from collections.abc import Iterable

from dmax_kernels.decoding.polling import Snapshot
from dmax_kernels.decoding.requests import Request
from dmax_kernels.decoding.state import LiveBlocks


class PromotionLog:
    """Counts from snapshots: how many masks a row had before a step, and has after it."""

    def __init__(self, state: LiveBlocks, requests: list[Request]) -> None:
        masked = state.masked.sum(dim=-1).tolist()
        self._masked = {each.row: count for each, count in zip(requests, masked, strict=True)}
        self._steps = dict.fromkeys(self._masked, 0)  # of the live block
        self.promotions: dict[int, list[int]] = {row: [] for row in self._masked}

    def begin(self, rows: Iterable[int], num_masked: int) -> None:
        """In these rows a block begins, with so many masks."""
        for row in rows:
            self._masked[row], self._steps[row] = num_masked, 0

    def add(self, snapshot: Snapshot) -> None:
        steps, left = snapshot.step.tolist(), snapshot.num_masked.tolist()
        for (request, start), step, masked in zip(snapshot.rows, steps, left, strict=True):
            row = request.row
            if request.start != start or step == self._steps[row]:
                continue  # the row had converged before this step
            self.promotions[row].append(self._masked[row] - masked)
            self._masked[row], self._steps[row] = masked, step
