"""Adapters that put `dmax_kernels` into other people's engines, one module per engine.

Importing a module here imports no engine. The engine's class is looked up inside the function that
needs it, and an adapter therefore works with whatever version is installed. What an adapter does
not cover (sampling with the engine's own noise, float64 statistics, ...) it leaves to the engine's
own code. docs/integrations.md lists the engines, the versions that were read, what was run, and the
differences.
"""

from __future__ import annotations

import importlib
from operator import attrgetter
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from dmax_kernels.decoding.embedding import is_lookup

_lookups: WeakSet[nn.Module] = WeakSet()  # layers that `lookup_weight` has compared


def engine_objects(engine: str, module: str, *names: str) -> tuple[Any, ...]:
    """The engine's own objects, by dotted name inside `module`.

    Raises:
        ImportError: one sentence, if the engine is absent or this version of it lacks a name.
    """
    try:
        imported = importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{engine}: module {module} must be importable, got: {error}") from error
    for name in names:
        try:
            attrgetter(name)(imported)
        except AttributeError:
            raise ImportError(
                f"{engine}: {module} must have {name}, which this version lacks "
                "(docs/integrations.md lists the versions that were read)"
            ) from None
    return tuple(attrgetter(name)(imported) for name in names)


def lookup_weight(adapter: str, layer: Any) -> Tensor:
    """The weight [V, D] of an engine's embedding layer, whose rows the ops look up themselves.

    An engine's layer has a class of its own: once per layer, two ids go through its forward.

    Raises:
        ValueError: the forward does more than look up rows (a scale, an adapter, offloading).
    """
    weight = layer.weight.detach()  # an engine need not switch gradients off; the step has none
    if is_lookup(layer) or layer in _lookups:
        return weight
    ids = torch.tensor([0, len(weight) // 2], device=weight.device)
    with torch.no_grad():
        rows = None if weight.is_meta else layer(ids)
        if rows is None or rows.dtype != weight.dtype or not torch.equal(rows, weight[ids]):
            raise ValueError(
                f"{adapter}: the input embedding must be a layer whose forward looks up rows of "
                f"its weight and does no more, got {type(layer).__name__} (it may be "
                "scaled, adapted or offloaded)"
            )
    _lookups.add(layer)
    return weight
