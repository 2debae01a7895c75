"""One function over many tasks, in processes of which each has loaded its models once."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import torch

from dmax_kernels.models.pretrained import Loaded, load_pretrained

# Makes what a process needs for all of its tasks, from the process's number, counted from 0
Setup = Callable[[int], Any]


class Models:
    """Models by label, loaded when they are asked for. One is held at a time: they may be large.

    Args:
        names: what `load_pretrained` loads, for each label.
        device: "cuda" is the GPU of the process's number.
    """

    def __init__(
        self,
        names: dict[str, str],
        number: int = 0,
        *,
        dtype: torch.dtype | None = None,
        device: str = "cpu",
    ) -> None:
        self.names = names
        self.dtype = dtype
        self.device = device
        if device == "cuda":
            self.device = f"cuda:{number % torch.cuda.device_count()}"
        self.held: tuple[str, Loaded] | None = None

    def get(self, label: str) -> Loaded:
        if self.held is None or self.held[0] != label:
            self.held = None  # first, or both would be in memory
            name = self.names[label]
            self.held = label, load_pretrained(name, dtype=self.dtype, device=self.device)
        return self.held[1]


def run_tasks(
    function: Callable[[Any, Any], Any],
    tasks: Sequence[Any],
    setup: Setup,
    *,
    workers: int = 1,
    threads: int = 1,
) -> Iterator[tuple[Any, Any]]:
    """(task, function(state, task)) as the results come, where state is setup(process's number).

    One worker is this very process, in order. Several are new processes with `threads` CPU threads
    each; they need a function, a setup and tasks that can be pickled.
    """
    if workers == 1:
        state = setup(0)
        for task in tasks:
            yield task, function(state, task)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy torch's thread pools
    executor = ProcessPoolExecutor(
        workers,
        mp_context=context,
        initializer=_start,
        initargs=(setup, threads, context.Value("i", 0)),
    )
    try:
        waiting = {executor.submit(_call, function, task): task for task in tasks}
        for done in as_completed(waiting):
            yield waiting[done], done.result()
    finally:
        executor.shutdown(cancel_futures=True)


def available_cores() -> int:
    """Cores that this process may use, if the system tells; else all of the machine's."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


_held: dict[str, Any] = {}  # one worker's state


def _start(setup: Setup, threads: int, counter: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent reports an interrupt, in one line
    torch.set_num_threads(threads)
    with counter.get_lock():
        number = counter.value
        counter.value += 1
    _held["setup"], _held["number"] = setup, number


def _call(function: Callable[[Any, Any], Any], task: Any) -> Any:
    # Not in `_start`: what fails there reaches the parent as a broken pool, without its reason
    if "state" not in _held:
        _held["state"] = _held["setup"](_held["number"])
    return function(_held["state"], task)
