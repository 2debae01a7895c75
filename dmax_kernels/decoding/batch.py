"""The batch that runs: live rows, each in its own block; one forward pass and step at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from functools import partial

import torch

from dmax_kernels.decoding.forward import BlockForward
from dmax_kernels.decoding.graph import StepRunner
from dmax_kernels.decoding.polling import Snapshot, to_device
from dmax_kernels.decoding.promotion_log import PromotionLog
from dmax_kernels.decoding.requests import CommittedBlock, Request
from dmax_kernels.decoding.settings import Settings
from dmax_kernels.decoding.state import LiveBlocks
from dmax_kernels.decoding.trace import Trace

# A captured step attends to a multiple of this many positions, so that a graph serves many blocks
GRAPH_POSITIONS = 512


class Batch:
    """Rows start together, go from block to block each by itself, and leave one by one."""

    def __init__(
        self,
        forward: BlockForward,
        state: LiveBlocks,
        requests: list[Request],
        settings: Settings,
        runner: StepRunner,
        poll_lag: int,
        trace: Trace | None,
    ) -> None:
        self.forward, self.state, self.settings = forward, state, settings
        self.requests = list(requests)  # by row of the batch
        self.runner, self.poll_lag, self.trace = runner, poll_lag, trace
        self.promotions = PromotionLog(state, requests)
        self.refresh = False  # a row's last block is committed, but not in the cache yet
        self.forwards = self.refreshing_forwards = 0

    def run(self) -> Iterator[CommittedBlock]:
        """Step until every row has ended; yields each block once it is committed."""
        pending: deque[Snapshot] = deque()
        while self.requests:
            self.step()
            pending.append(Snapshot(self.state, self.requests))
            if len(pending) > self.poll_lag:
                yield from self.advance(pending.popleft())

    def step(self) -> None:
        """One forward pass over the live blocks and one update of their state."""
        length = self.settings.block_length
        visible = max(request.start for request in self.requests) + length
        if self.runner.captures:
            visible = -(-visible // GRAPH_POSITIONS) * GRAPH_POSITIONS
            visible = min(visible, self.forward.tokens.shape[1])
        refresh, self.refresh = self.refresh, False
        self.forwards += 1
        self.refreshing_forwards += refresh
        if self.trace is not None:
            self.trace.before(self.state)
        key = (len(self.requests), refresh, visible)
        self.runner(key, partial(self._denoise, refresh, visible))
        if self.trace is not None:
            self.trace.after(self.state)

    def _denoise(self, refresh: bool, visible: int) -> None:
        """What a CUDA graph captures: nothing here waits for the device or depends on a value."""
        logits = self.forward.logits(self.state, refresh, visible)
        s = self.settings
        s.rule.update_(logits, self.forward.embedding, self.state, s)
        # The released code stops with whatever the block holds
        self.state.cap_(s.max_steps_per_block, commit=s.semantics != "released")

    def advance(self, snapshot: Snapshot) -> Iterator[CommittedBlock]:
        """Rows that have converged go on to their next block, or end."""
        snapshot.wait()  # the one host sync per pass: what converged decides what comes next
        self.promotions.add(snapshot)
        begins = set()
        for i in torch.nonzero(snapshot.converged).flatten().tolist():
            request, start = snapshot.rows[i]
            if request.finished or request.start != start:
                continue  # taken from an earlier snapshot
            yield request.commit(snapshot.token[i].tolist(), int(snapshot.step[i]), self.settings)
            if not request.finished:
                begins.add(request.row)
        if begins:
            self._begin_blocks(begins)
        self._leave()

    def _begin_blocks(self, rows: set[int]) -> None:
        self.forward.commit(self.state)
        self.refresh = self.forward.cache is not None
        device, s = self.state.token.device, self.settings
        begins = [request.row in rows for request in self.requests]
        starts = [request.start for request in self.requests]
        begin = to_device(begins, torch.bool, device)
        start = to_device(starts, torch.int64, device)
        self.state.begin_(begin, start, s.mask_token_id, self.forward.embedding)
        s.rule.begin_(self.state, begin, self.forward.embedding, s)
        self.promotions.begin(rows, s.block_length)

    def _leave(self) -> None:
        """Rows that have ended give their place to live ones from the batch's end.

        Where steps are captured, each number of rows is another graph: then only once half have
        ended. Until then an ended row stays converged, which a step leaves alone.
        """
        live = [not request.finished for request in self.requests]
        count = sum(live)
        if count == len(live) or (self.runner.captures and 2 * count > len(live)):
            return
        holes = [i for i in range(count) if not live[i]]
        sources = [i for i in range(count, len(live)) if live[i]]
        for source, hole in zip(sources, holes, strict=True):
            self.requests[hole] = self.requests[source]
        del self.requests[count:]
        if holes:
            device = self.state.token.device
            where = [to_device(each, torch.int64, device) for each in (sources, holes)]
            self.state.move_rows_(*where)
            self.forward.move_rows_(*where)
        self.state = self.state.first(count)
