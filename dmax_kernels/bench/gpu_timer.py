"""How candidates are timed on a GPU, where a launch costs as much as a kernel takes.

"us" is a call's share of one graph of twenty calls that cycles through several copies of the
inputs, more than the L2 cache holds. A call therefore carries a twentieth of the few microseconds
that the events and the graph cost. "cold us" and "hot us" are one call between two events, cost
included: "cold" after other memory has passed through the cache, "hot" right after the same call.
An empty kernel is timed in all three ways in the same rounds.
"""

from __future__ import annotations

import math
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from dmax_kernels.bench.timer import FEWEST_ROUNDS, Candidate, Timing, warm_up
from dmax_kernels.bench.workload import Work
from dmax_kernels.decoding.graph import capture_stream, end_failed_capture

NODES = 20  # calls in one graph
ROTATED_BYTES = 256 << 20  # of all copies together: several times any L2
LONG_SECONDS = 1e-3  # from here on a launch is below 1 %, and each call its own graph
EMPTY = "empty kernel"


class Gpu:
    """The current CUDA device as the timer uses it."""

    matrix_size = 8192
    flush_bytes = 512 << 20  # more than any L2

    def __init__(self) -> None:
        self.flushed = torch.ones(self.flush_bytes // 4, device="cuda")
        self.stream = capture_stream(self.flushed.device)
        self.pool = torch.cuda.graph_pool_handle()

    def large_buffer(self) -> torch.Tensor:
        return torch.empty(1 << 29, dtype=torch.float32, device="cuda").normal_()  # 2 GiB

    def flush(self) -> None:
        """Reads through the L2 cache. Written lines would have to be evicted in the timed call."""
        self.flushed.sum()

    def empty(self) -> None:
        torch.cuda._sleep(0)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def has_room(self) -> bool:
        free, total = torch.cuda.mem_get_info()
        return free > total / 2

    def seconds(self, run: Candidate) -> float:
        """Seconds between the events around it."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # keeps the GPU busy while the host queues both events, so that they bracket the work alone
        torch.cuda._sleep(200_000)
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def median(self, run: Candidate, repetitions: int = 20) -> float:
        run()
        return statistics.median(self.seconds(run) for _ in range(repetitions))

    def captured(self, calls: Sequence[Candidate]) -> tuple[Candidate, str]:
        """The calls as one graph replay, or one by one where they cannot be captured."""
        try:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for call in calls:
                    call()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                for call in calls:
                    call()
            return graph.replay, "graph"
        except RuntimeError:
            torch.cuda.synchronize()
            end_failed_capture(self.stream)
            self.pool = torch.cuda.graph_pool_handle()
            return lambda: [call() for call in calls], "eager"

    def peak_bytes(self, call: Candidate) -> int:
        """Peak bytes that one call allocates, its results included."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def release(self) -> None:
        """Before a case: gives back the memory of the last one.

        The graphs of a case share a pool of memory, since they never run at once and nobody reads
        their results. PyTorch refuses a pool whose graphs are all gone, hence a new one.
        """
        torch.cuda.empty_cache()
        self.pool = torch.cuda.graph_pool_handle()

    def clocks(self) -> str:
        """The multiprocessor and memory clocks and the power drawn, where the driver tells."""
        tool = shutil.which("nvidia-smi")
        if tool is None:
            return "unknown"
        query = ["--query-gpu=clocks.sm,clocks.mem,power.draw", "--format=csv,noheader"]
        done = subprocess.run([tool, *query], capture_output=True, text=True, check=False)
        return done.stdout.strip().split("\n")[0] if done.returncode == 0 else "unknown"


def copies_of(make: Callable[[], Work], gpu: Gpu) -> list[Work]:
    """The work on enough sets of tensors that none stays in the cache, at most 20."""
    works = [make()]
    bytes_moved = works[0].bytes_moved
    wanted = min(NODES, math.ceil(ROTATED_BYTES / bytes_moved)) if bytes_moved else 1
    while len(works) < wanted and gpu.has_room():
        works.append(make())
    return works


def gpu_rows(
    make: Callable[[], Work],
    gpu: Gpu,
    repetitions: int,
    at_most_seconds: float,
    failed: dict[str, str],
) -> tuple[Work, dict[str, dict[str, Any]], dict[str, Any]]:
    """(the work, a row for each candidate, what else was seen). See the top of this file."""
    gpu.release()
    works = copies_of(make, gpu)
    work = works[0]
    restores = [each.restore for each in works if each.restore]
    before = gpu.clocks()
    plans: dict[str, dict[str, Any]] = {}
    peaks = {}
    first_calls = warm_up(work.candidates, work.restore, failed)
    for name in first_calls:
        try:
            calls = [each.candidates[name] for each in works if name in each.candidates]
            peaks[name] = gpu.peak_bytes(calls[0])
            once, how = gpu.captured(calls[:1])
            seconds = gpu.seconds(once)
            if seconds < LONG_SECONDS and not restores:
                calls = [calls[index % len(calls)] for index in range(NODES)]
            elif seconds >= LONG_SECONDS:
                calls = calls[:1]
            many = once if len(calls) == 1 else gpu.captured(calls)[0]
            plans[name] = {"once": once, "many": many, "calls": len(calls), "run": how}
        except Exception as error:
            if name == "fused":
                raise
            failed[name] = f"failed: {type(error).__name__}: {error}".splitlines()[0]
    empties = gpu.captured([gpu.empty])[0], gpu.captured([gpu.empty] * NODES)[0]
    plans[EMPTY] = {"once": empties[0], "many": empties[1], "calls": NODES, "run": "graph"}
    times: dict[str, dict[str, list[float]]] = {
        name: {"us": [], "cold us": [], "hot us": []} for name in plans
    }
    begin = time.perf_counter()
    for round_index in range(repetitions):
        for name, plan in plans.items():  # in turn: a GPU at its power limit slows down for all
            for what, run in (("us", "many"), ("cold us", "once"), ("hot us", "once")):
                for restore in restores:
                    restore()
                if what != "hot us":
                    gpu.flush()
                share = plan["calls"] if what == "us" else 1
                times[name][what].append(gpu.seconds(plan[run]) / share)
        if round_index + 1 >= FEWEST_ROUNDS and time.perf_counter() - begin > at_most_seconds:
            break
    rows = {}
    for name, by_way in times.items():
        row = Timing(by_way["us"]).row()
        row |= {way: Timing(by_way[way]).microseconds for way in ("cold us", "hot us")}
        row |= {"run": plans[name]["run"], "calls": plans[name]["calls"]}
        rows[name] = row | ({"peak bytes": peaks[name]} if name in peaks else {})
    extra = {EMPTY: rows.pop(EMPTY), "copies": len(works), "clocks": [before, gpu.clocks()]}
    return work, rows, extra
