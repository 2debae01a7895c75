"""Checks that end in one sentence: what must be what, and what it is instead."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import field, fields
from typing import Any, TypeVar

from dmax_kernels._numbers import as_integer, as_number, shown

Config = TypeVar("Config", bound=type)


def require(condition: bool, what: str, need: str, got: object) -> None:
    """Raise a ValueError unless the condition holds."""
    if not condition:
        raise ValueError(f"{what} must be {need}, got {got}")


def one_of(names: Iterable[object]) -> str:
    return "one of " + ", ".join(repr(name) for name in names)


def read_integer(
    what: str, value: object, need: str, least: int | None = 1, below: int | None = None
) -> int:
    """`value` as a Python int, which Python, NumPy or a tensor may hold; in [least, below)."""
    number = as_integer(value)
    require(
        number is not None
        and (least is None or number >= least)
        and (below is None or number < below),
        what,
        need,
        shown(value),
    )
    assert number is not None
    return number


def read_number(what: str, value: object, need: str, accepts: Callable[[float], bool]) -> float:
    """`value` as a Python float, if it is a number that `accepts` takes."""
    number = as_number(value)
    require(number is not None and accepts(number), what, need, shown(value))
    assert number is not None
    return number


def option(
    default: Any,
    help: str,
    choices: tuple[str, ...] | None = None,
    repeated: str | None = None,
) -> Any:
    """A field of a configuration, with the text that a command shows for it.

    default: MISSING where the caller must give a value. repeated: how one value is written, where
    the command's option may be given several times.
    """
    metadata = {"help": help, "choices": choices, "repeated": repeated}
    return field(default=default, metadata=metadata)


def document_fields(config: Config) -> Config:
    """Add the help of its fields to a configuration's docstring."""
    lines = [f"    {item.name}: {item.metadata['help']}" for item in fields(config)]
    config.__doc__ = f"{config.__doc__}\n\nArgs:\n" + "\n".join(lines)
    return config
