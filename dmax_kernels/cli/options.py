"""Command-line options made of a configuration's fields (`dmax_kernels._checks.option`)."""

from __future__ import annotations

import argparse
from typing import Any

# How a field of this type is read, and what stands for its value in the help
KINDS = {"int": (int, "N"), "float": (float, "X")}


def add_option(group: argparse._ArgumentGroup, item: Any, default: Any) -> None:
    """The option of one field; in the parsed result only where it was given.

    default: what the help says of it, nothing for None or False.
    """
    flag = "--" + item.name.replace("_", "-")
    text = item.metadata["help"].replace("%", "%%")
    if default is not None and default is not False:
        default = "on" if default is True else default
        values = default if isinstance(default, tuple) else (default,)
        text += f" (default: {' '.join(map(str, values))})"
    kwargs: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text}
    if item.type.startswith("bool"):
        kwargs["action"] = argparse.BooleanOptionalAction
    elif item.metadata["repeated"]:
        kwargs |= {"action": "append", "metavar": item.metadata["repeated"]}
        kwargs["help"] += "; may be given several times"
    elif item.type.startswith("tuple"):
        kwargs |= {"nargs": 2, "type": float, "metavar": ("A", "B")}
    else:
        kind, metavar = KINDS.get(item.type.split()[0], (str, "NAME"))
        choices = item.metadata["choices"]
        kwargs |= {"type": kind, "choices": choices, "metavar": None if choices else metavar}
    group.add_argument(flag, **kwargs)
