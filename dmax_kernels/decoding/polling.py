"""What the host wants to know of a step, copied while the device goes on."""

from __future__ import annotations

import torch
from torch import Tensor

from dmax_kernels.decoding.requests import Request
from dmax_kernels.decoding.state import LiveBlocks


class Snapshot:
    """Some of a step's state on its way to the host; `wait` before reading.

    On a GPU the copies go to pinned memory behind the step, with an event after them: making a
    snapshot waits for nothing, and the host may launch more before it looks. That is safe because a
    step leaves converged rows alone: a row that has converged in the meantime only repeats itself.
    """

    def __init__(self, state: LiveBlocks, requests: list[Request]) -> None:
        # Whose rows these are, and in which block, by the time of the step
        self.rows = [(request, request.start) for request in requests]
        self._event: torch.cuda.Event | None = None
        device = state.token.device
        self.converged = to_host(state.converged)
        self.step = to_host(state.step)
        self.token = to_host(state.token)
        self.num_masked = to_host(state.masked.sum(dim=-1))
        if device.type == "cuda":
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(device))

    def wait(self) -> None:
        if self._event is not None:
            self._event.synchronize()


def to_host(source: Tensor) -> Tensor:
    """A copy on the host; from a GPU without waiting for it."""
    if source.device.type == "cpu":
        return source.clone()
    copy = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
    return copy.copy_(source, non_blocking=True)


def to_device(values: list, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The host's values on the device; to a GPU without waiting for it."""
    source = torch.tensor(values, dtype=dtype)
    if device.type == "cpu":
        return source
    return source.pin_memory().to(device, non_blocking=True)
