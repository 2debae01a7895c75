"""Adapters that put `dmax_kernels` into other people's engines, one module per engine.

Importing a module here imports no engine: the engine's class is looked up inside the function that
needs it, so an adapter follows whatever version is installed and pins none. What an adapter does
not cover (sampling with the engine's own noise, float64 statistics, ...) it hands to the engine's
own code. docs/integrations.md lists engines, versions read, what was run and the differences.
"""

from __future__ import annotations

import importlib
from operator import attrgetter
from typing import Any


def engine_objects(engine: str, module: str, *names: str) -> tuple[Any, ...]:
    """The engine's own objects, by dotted name inside `module`.

    Raises:
        ImportError: one sentence, if the engine is absent or this version of it lacks a name.
    """
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{engine}: module {module} must be importable, got: {error}") from error
    for name in names:
        try:
            attrgetter(name)(found)
        except AttributeError:
            raise ImportError(
                f"{engine}: {module} must have {name}, which this version lacks "
                "(docs/integrations.md lists the versions that were read)"
            ) from None
    return tuple(attrgetter(name)(found) for name in names)
