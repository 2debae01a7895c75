"""The list of peers, and how a workload's peers become candidates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from dmax_kernels.bench.workload import Work


@dataclass(frozen=True)
class CpuPeer:
    workload: str
    name: str
    function: Callable
    compiled: bool
    call: Callable  # (function, given) -> the candidate


CPU_PEERS: list[CpuPeer] = []


def direct(function: Callable, given: dict[str, Any]) -> Callable[[], object]:
    return lambda: function(**given)


def expert(workload: str, name: str, *, compiled: bool = False, call: Callable = direct):
    """Registers a function of the workload's `given`; `compiled`: also under torch.compile."""

    def register(function: Callable) -> Callable:
        CPU_PEERS.append(CpuPeer(workload, name, function, compiled, call))
        return function

    return register


def add_cpu_peers(work: Work, workload: str, *, compiled: bool) -> None:
    """Adds them to the candidates; the timer names those that fail."""
    for peer in (each for each in CPU_PEERS if each.workload == workload):
        work.candidates[peer.name] = peer.call(peer.function, work.given)
        if compiled and peer.compiled:
            function = torch.compile(peer.function, dynamic=False)
            work.candidates[f"torch.compile of {peer.name}"] = peer.call(function, work.given)
