"""The whole step as a CUDA graph: one launch instead of one per kernel of the forward pass."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cache

import torch

Step = Callable[[], None]


class StepRunner:
    """Runs a step plainly, or as a graph, which is captured the second time a key comes up.

    Whatever a step reads and writes lies in buffers that do not move, and a replay therefore does
    what the call would do. The key names what else may differ between two steps (rows, refresh,
    visible positions). The first step of a key runs plainly, which is also the warm-up that a
    capture needs. The driver refuses a model that cannot be captured (some mixture-of-experts code
    asks the host where its tokens go): with `required` that is an error, otherwise the run goes on
    plainly and `refusal` says why.
    """

    def __init__(self, capture: Callable[[Step], Step] | None, required: bool = False) -> None:
        self.capture = capture
        self.required = required
        self.refusal: str | None = None
        self.replays: dict[Hashable, Step] = {}
        self._seen: set[Hashable] = set()

    @property
    def captures(self) -> bool:
        return self.capture is not None

    def __call__(self, key: Hashable, step: Step) -> None:
        if self.captures and key in self._seen and key not in self.replays:
            self._capture(key, step)
        self._seen.add(key)
        self.replays.get(key, step)()

    def _capture(self, key: Hashable, step: Step) -> None:
        assert self.capture is not None
        try:
            self.replays[key] = self.capture(step)
        except RuntimeError as error:
            reason = str(error).split("\n")[0]
            if self.required:
                raise ValueError(
                    f"spd_generate: cuda_graph must be False or None for this model, got True: "
                    f"its forward pass cannot be captured ({reason})"
                ) from error
            self.capture, self.refusal = None, reason


class CudaCapture:
    """Captures steps of one run into CUDA graphs that share their memory.

    The model's device need not be the current one. PyTorch captures on the device of a stream, by
    default that of the process's first capture; the graph of a step elsewhere would be empty.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = capture_stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Step) -> Step:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.stream.device):
            try:
                with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                    step()
            except RuntimeError:
                end_failed_capture(self.stream)
                raise
        return graph.replay


@cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One per device and process, because cuBLAS keeps a workspace for each stream it meets."""
    return torch.cuda.Stream(device)


def end_failed_capture(stream: torch.cuda.Stream) -> None:
    """A capture that fails leaves the generators of its device in capturing mode (seen with torch
    2.11), in which the next ``torch.randn`` raises; one that succeeds takes them out of it."""
    with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream):
        torch.zeros(1, device=stream.device)


def make_runner(cuda_graph: bool | None, device: torch.device) -> StepRunner:
    """cuda_graph: None captures on a GPU where it can, True must capture, False never does."""
    if cuda_graph and device.type != "cuda":
        raise ValueError(
            f"spd_generate: cuda_graph must be False or None unless the model is on a GPU, "
            f"got True on {device.type}"
        )
    captures = device.type == "cuda" and cuda_graph is not False
    return StepRunner(CudaCapture(device) if captures else None, required=bool(cuda_graph))
