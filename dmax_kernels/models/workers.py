"""Many tasks in several processes, of which each loads its models once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from typing import Any

import torch

from dmax_kernels.models.pretrained import Loaded, load_pretrained

Work = Callable[[Any], Any]  # from a task to its result
# Makes a process's work, from the process's number, counted from 0. It is sent to a process once,
# with all that its tasks share; a task is sent alone.
Setup = Callable[[int], Work]
WithModels = Callable[["Models", Any], Any]  # from models and a task to its result


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


def with_models(
    function: Callable[[Models, Any], Any], names: dict[str, str], **options: Any
) -> Setup:
    """The setup of work that is function(models, task); `options` are those of `Models`."""
    return partial(_bind, function, partial(Models, names, **options))


def _bind(
    function: Callable[[Models, Any], Any], load: Callable[[int], Models], number: int
) -> Work:
    return partial(function, load(number))


def run_tasks(
    setup: Setup, tasks: Iterable[Any], *, workers: int = 1, threads: int = 1
) -> Iterator[tuple[Any, Any]]:
    """(task, its result) as the results come.

    One worker is this very process, in order. Several are new processes with `threads` CPU threads
    each; they need a setup and tasks that can be pickled.
    """
    if workers == 1:
        work = setup(0)
        for task in tasks:
            yield task, work(task)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy torch's thread pools
    executor = ProcessPoolExecutor(
        workers,
        mp_context=context,
        initializer=_start,
        initargs=(setup, threads, context.Value("i", 0)),
    )
    try:
        waiting = {executor.submit(_work, task): task for task in tasks}
        for done in as_completed(list(waiting)):
            # Taken out, or every result would stay in memory
            yield waiting.pop(done), done.result()
    finally:
        executor.shutdown(cancel_futures=True)


def available_cores() -> int:
    """Cores that this process may use, if the system tells; else all of the machine's."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


_held: dict[str, Any] = {}  # one worker's work, and what makes it


def _start(setup: Setup, threads: int, counter: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent reports an interrupt, in one line
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    with counter.get_lock():
        number = counter.value
        counter.value += 1
    _held["setup"] = partial(setup, number)


def _end_with_parent() -> None:
    """A parent that is killed cannot stop its workers, which would go on to write what a second run
    writes too."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(task: Any) -> Any:
    # Not in `_start`: what fails there reaches the parent as a broken pool, without its reason
    if "work" not in _held:
        _held["work"] = _held["setup"]()
    return _held["work"](task)
