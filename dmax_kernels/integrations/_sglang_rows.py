"""How the SGLang algorithms keep their rows: device buffers of a batch, and a place per request.

Nothing here knows a decoding rule.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.util import find_spec
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from dmax_kernels._numbers import as_number, shown

# The requests that SGLang's scheduler holds, by their id: what a batch tells an algorithm of its
# requests is their ids alone
_requests: WeakValueDictionary[str, Any] = WeakValueDictionary()


@dataclass
class Place:
    """One request's row in the buffers of a batch."""

    buffers: Any  # a dataclass of tensors [B, ...]
    row: int


def batch_of(places: list[Place]) -> Any:
    """The places' rows as one batch in their order: the batch they are in, or else copies."""
    first = places[0].buffers
    rows = len(next(iter(vars(first).values())))
    if rows == len(places) and all(
        place.buffers is first and place.row == row for row, place in enumerate(places)
    ):
        return first
    joined = type(first)(
        **{
            name: torch.cat(
                [getattr(place.buffers, name)[place.row : place.row + 1] for place in places]
            )
            for name in vars(first)
        }
    )
    for row, place in enumerate(places):
        place.buffers, place.row = joined, row
    return joined


def per_request(**options: Callable[[float], bool]) -> type:
    """A class that reads these options of an algorithm request by request.

    A request gives them as `custom_params` of its sampling parameters; what it does not give is the
    algorithm's own attribute of that name.

    options: what each of them must satisfy.
    """

    class PerRequest:
        @classmethod
        def validate_request(cls, req: Any) -> str | None:
            refusal = super().validate_request(req)  # type: ignore[misc]
            if refusal is not None:
                return str(refusal)
            given = req.sampling_params.custom_params or {}
            for name, accepts in options.items():
                number = as_number(given[name]) if name in given else None
                if name in given and (number is None or not accepts(number)):
                    return (
                        f"{cls.__name__}: custom_params[{name!r}] must be a number that the "
                        f"algorithm can use, got {shown(given[name])}"
                    )
            _requests[req.rid] = req
            return None

        def request_options(self, forward_batch: Any) -> Tensor:
            """float32 [B, number of options], in the order of `options`."""
            rids = getattr(forward_batch, "rids", None) or [None] * forward_batch.batch_size
            rows = []
            for rid in rids:
                request = None if rid is None else _requests.get(rid)
                given = request.sampling_params.custom_params if request is not None else None
                rows.append([float((given or {}).get(n, getattr(self, n))) for n in options])
            device = forward_batch.input_ids.device
            return torch.tensor(rows, dtype=torch.float32, device=device)

    return PerRequest


def probability(value: float) -> bool:
    return 0 <= value <= 1


def places(buffers: Any) -> list[Place]:
    """A place for every row."""
    return [Place(buffers, row) for row in range(len(buffers.finished))]


class OneReadPerStep:
    """SGLang's `step` on top of `device_step`."""

    def device_step(self, forward_batch: Any, logits: Tensor, rows: Any) -> None:
        """Advance forward_batch.input_ids and the rows; rows.finished says which blocks are done.

        Nothing is read on the host.
        """
        raise NotImplementedError

    def step(self, forward_batch: Any, full_logits: Any, states: list[Any]) -> list[bool]:
        rows = batch_of(states)
        self.device_step(forward_batch, full_logits, rows)
        finished: list[bool] = rows.finished.tolist()  # the one host read
        return finished


class BatchedRounds(OneReadPerStep):
    """The hooks with which one scheduling round runs several forwards without a host read.

    They are those of SGLang's open change #33190; 0.5.23 does not call them. An algorithm that
    prepares a forward's inputs must leave them out: between these hooks nothing calls it.
    """

    def fdfo_batched_begin(self, forward_batch: Any, states: list[Any]) -> Any:
        return batch_of(states)

    def fdfo_batched_step(self, forward_batch: Any, full_logits: Any, ctx: Any) -> None:
        self.device_step(forward_batch, full_logits, ctx)

    def fdfo_batched_all_finished(self, ctx: Any) -> bool:
        return bool(ctx.finished.all())

    def fdfo_batched_end(self, ctx: Any, states: list[Any]) -> list[bool]:
        finished: list[bool] = ctx.finished.tolist()
        return finished


class AfterImport(MetaPathFinder):
    """Finds one package, as the other finders do, and calls a function once it has been run."""

    def __init__(self, package: str, function: Callable[[], None]) -> None:
        self.package, self.function = package, function

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != self.package:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_call(module: Any) -> None:
                run(module)
                self.function()

            spec.loader.exec_module = run_and_call  # type: ignore[method-assign]
        return spec
