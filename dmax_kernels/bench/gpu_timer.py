"""Times on a GPU: replays of a captured graph, with the L2 cache cold and hot, by events."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

from dmax_kernels.bench.timer import Timing

FLUSH_BYTES = 512 << 20  # more than any L2


@dataclass
class GpuTiming:
    """One candidate on a GPU."""

    cold: Timing  # the L2 overwritten before each repetition
    hot: Timing
    run: str  # "graph", or "eager" where it cannot be captured
    peak_bytes: int  # allocated by one call at its highest


def captured(function: Callable[[], object]) -> tuple[Callable[[], object], str]:
    """The function as a graph replay, or as it is where it cannot be captured (it syncs)."""
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                function()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
        return graph.replay, "graph"
    except RuntimeError:
        torch.cuda.synchronize()
        return function, "eager"


def timed(
    run: Callable[[], object],
    repetitions: int,
    *,
    flush: torch.Tensor | None = None,
    restore: Callable[[], object] | None = None,
) -> Timing:
    """Each repetition by the events around it; ``flush`` is overwritten before it (a cold L2)."""
    seconds = []
    for _ in range(repetitions):
        if restore is not None:
            restore()
        if flush is not None:
            flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # keeps the GPU busy while the host queues both events, so that they bracket the work alone
        torch.cuda._sleep(200_000)
        start.record()
        run()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    return Timing(seconds)


def compare_on_gpu(
    candidates: dict[str, Callable[[], object]],
    *,
    repetitions: int = 200,
    restore: Callable[[], object] | None = None,
) -> dict[str, GpuTiming]:
    """Every candidate cold and hot, how it ran, and the bytes it allocated at its peak."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    results = {}
    for name, candidate in candidates.items():
        peak = peak_bytes(candidate)
        run, how = captured(candidate)
        cold = timed(run, repetitions, flush=flush, restore=restore)
        hot = timed(run, repetitions, restore=restore)
        results[name] = GpuTiming(cold, hot, how, peak)
    return results


def peak_bytes(function: Callable[[], object]) -> int:
    """Bytes that one call allocates at its highest, its results included."""
    function()  # first calls compile and keep buffers
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def copy_bandwidth() -> float:
    """Bytes per second of a device-to-device copy of 2 GiB, read and written."""
    source = torch.empty(1 << 30, dtype=torch.int16, device="cuda").random_()
    target = torch.empty_like(source)
    seconds = timed(lambda: target.copy_(source), 20).seconds
    return 2 * source.nbytes / statistics.median(seconds)


def multiply_rate(dtype: torch.dtype, size: int = 8192) -> float:
    """FLOP per second of PyTorch's product of two square matrices."""
    a, b = (torch.randn(size, size, device="cuda", dtype=dtype) for _ in range(2))
    return 2 * size**3 / timed(lambda: a @ b, 20).median
