"""The batch that runs: live rows, each in its own block; one forward pass and step at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from dmax_kernels.decoding.config import RunConfig
from dmax_kernels.decoding.forward import BlockForward
from dmax_kernels.decoding.graph import StepRunner
from dmax_kernels.decoding.masks import BlockMasks
from dmax_kernels.decoding.penalties import Penalties
from dmax_kernels.decoding.state import LiveBlocks
from dmax_kernels.decoding.step import Rule
from dmax_kernels.decoding.trace import Trace

# A captured step attends to a multiple of this many positions, so that one graph serves many blocks
GRAPH_POSITIONS = 512


@dataclass(frozen=True)
class CommittedBlock:
    """New tokens of one row, as `on_block` receives them when the block is committed."""

    row: int
    start: int  # index of the first new token in the answer
    token_ids: list[int]  # up to and including an end token, or up to max_new_tokens
    forwards: int  # denoising passes that the block took
    finished: bool  # this is the row's last block


@dataclass
class Request:
    """One prompt on the host: what has been decoded of its answer, wherever its row now is."""

    row: int  # of the caller's prompts
    prompt_length: int
    start: int  # position of the live block's first token
    finished: bool = False
    answer: list[int] = field(default_factory=list)
    block_forwards: list[int] = field(default_factory=list)
    step_map: list[int] = field(default_factory=list)  # as long as the answer, if they are recorded
    logprobs: list[float] = field(default_factory=list)

    def commit(
        self,
        token: list[int],
        forwards: int,
        config: RunConfig,
        step_map: list[int],
        logprobs: list[float],
    ) -> CommittedBlock:
        """Take the K tokens of a converged block, then end the answer or go on to the next block.

        An answer ends at an end token or at `max_new_tokens`.
        """
        begin = len(self.answer)
        first = max(self.prompt_length - self.start, 0)  # after the prompt's tail
        new = token[first:][: config.max_new_tokens - begin]
        ends = [i for i, each in enumerate(new) if each in config.eos_token_id]
        if ends:
            new = new[: ends[0] + 1]
        self.answer += new
        self.step_map += step_map[first:][: len(new)]
        self.logprobs += logprobs[first:][: len(new)]
        self.block_forwards.append(forwards)
        self.finished = bool(ends) or len(self.answer) == config.max_new_tokens
        if not self.finished:
            self.start += config.block_length
        return CommittedBlock(self.row, begin, new, forwards, self.finished)


class Batch:
    """Rows start together, go from block to block independently, and leave one by one.

    forward, state: the model and the first block of each request. rule: the step after a pass.
    """

    def __init__(
        self,
        forward: BlockForward,
        state: LiveBlocks,
        requests: list[Request],
        rule: Rule,
        config: RunConfig,
        runner: StepRunner,
        trace: Trace | None,
        masks: BlockMasks | None = None,
        penalties: Penalties | None = None,
    ) -> None:
        self.forward, self.state, self.rule, self.config = forward, state, rule, config
        self.requests = list(requests)  # by row of the batch
        self.runner, self.trace, self.masks, self.penalties = runner, trace, masks, penalties
        self.promotions = PromotionLog(state, requests)
        self.refresh = False  # a row's last block is committed, but not in the cache yet
        self.forwards = self.refreshing_forwards = 0

    def run(self) -> Iterator[CommittedBlock]:
        """Step until every row has ended; yield each block once it is committed."""
        pending: deque[Snapshot] = deque()
        while self.requests:
            self.step()
            pending.append(Snapshot(self.state, self.requests))
            if len(pending) > self.config.poll_lag:
                yield from self.advance(pending.popleft())

    def step(self) -> None:
        """Run one forward pass over the live blocks and one update of their state."""
        visible = max(request.start for request in self.requests) + self.config.block_length
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
        state = self.state
        before = (state.masked.clone(), state.token.clone()) if state.record else None
        logits = self.forward.logits(self.state, refresh, visible)
        if self.penalties is not None:
            logits = self.penalties.changed(logits, state)
        self.rule.update_(logits, self.forward.embedding, self.state, self.config)
        # At the cap, the authors' released code stops with whatever the block holds
        commit = self.config.semantics != "released"
        self.state.cap_(self.config.max_steps_per_block, commit)
        if before is not None:
            state.record_(*before)

    def advance(self, snapshot: Snapshot) -> Iterator[CommittedBlock]:
        """Let rows that have converged go on to their next block, or end."""
        snapshot.wait()  # the one host sync per pass: what converged decides what comes next
        self.promotions.add(snapshot)
        begins = set()
        for i in torch.nonzero(snapshot.converged).flatten().tolist():
            request, start = snapshot.rows[i]
            if request.finished or request.start != start:
                continue  # an earlier snapshot has committed this block
            step_map, logprobs = (values[i].tolist() for values in snapshot.record)
            yield request.commit(
                snapshot.token[i].tolist(), int(snapshot.step[i]), self.config, step_map, logprobs
            )
            if not request.finished:
                begins.add(request.row)
        if begins:
            self._begin_blocks(begins)
        self._leave()

    def _begin_blocks(self, rows: set[int]) -> None:
        self.forward.commit(self.state)
        self.refresh = self.forward.cache is not None
        device, embedding = self.state.token.device, self.forward.embedding
        begin = to_device([each.row in rows for each in self.requests], torch.bool, device)
        start = to_device([each.start for each in self.requests], torch.int64, device)
        if self.penalties is not None:
            self.penalties.commit_(self.state, begin)
        self.state.begin_(begin, start, self.config.mask_token_id, embedding)
        if self.masks is not None:
            begun = [(i, each) for i, each in enumerate(self.requests) if each.row in rows]
            self.masks.begin_(self.state, begun)
        self.rule.begin_(self.state, begin, embedding, self.config)
        self.promotions.begin(rows, self.config.block_length)

    def _leave(self) -> None:
        """Rows that have ended give their places to live rows from the end of the batch.

        Each number of rows needs a CUDA graph of its own. Where steps are captured, rows therefore
        leave only once half have ended; until then a step leaves the ended rows unchanged.
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
            moves = [to_device(each, torch.int64, device) for each in (sources, holes)]
            self.state.move_rows_(*moves)
            self.forward.move_rows_(*moves)
        self.state = self.state.first(count)


class Snapshot:
    """The part of a step's state that the host needs, on its way there; `wait` before reading it.

    On a GPU the copies go to pinned memory after the step, followed by an event. Making a snapshot
    waits for nothing, and the host may launch more steps before it looks. That is safe because a
    step leaves converged rows alone: such a row is the same in every later snapshot.
    """

    def __init__(self, state: LiveBlocks, requests: list[Request]) -> None:
        # Each row's request, and the start of its block, at the time of the step
        self.rows = [(request, request.start) for request in requests]
        self._event: torch.cuda.Event | None = None
        device = state.token.device
        self.converged = to_host(state.converged)
        self.step = to_host(state.step)
        self.token = to_host(state.token)
        self.num_masked = to_host(state.masked.sum(dim=-1))
        recorded = [state.record[name] for name in ("step_map", "logprob") if state.record]
        self.record = list(map(to_host, recorded)) or [self.token[:, :0]] * 2
        if device.type == "cuda":
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(device))

    def wait(self) -> None:
        if self._event is not None:
            self._event.synchronize()


class PromotionLog:
    """How many positions of each row left the mask at each of its steps, counted by snapshots."""

    def __init__(self, state: LiveBlocks, requests: list[Request]) -> None:
        masked = state.masked.sum(dim=-1).tolist()
        self._masked = {each.row: count for each, count in zip(requests, masked, strict=True)}
        self._steps = dict.fromkeys(self._masked, 0)  # of the live block
        self.promotions: dict[int, list[int]] = {row: [] for row in self._masked}

    def begin(self, rows: Iterable[int], num_masked: int) -> None:
        """A block with `num_masked` masks begins in each of these rows."""
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


def to_host(source: Tensor) -> Tensor:
    """A copy on the host, made without waiting for a GPU."""
    if source.device.type == "cpu":
        return source.clone()
    copy = torch.empty(source.shape, dtype=source.dtype, device="cpu", pin_memory=True)
    return copy.copy_(source, non_blocking=True)


def to_device(values: list, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The host's values on the device, sent without waiting for a GPU."""
    source = torch.tensor(values, dtype=dtype, device="cpu")
    if device.type == "cpu":
        return source
    return source.pin_memory().to(device, non_blocking=True)
