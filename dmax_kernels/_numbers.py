"""Numbers as callers have them: Python's own, NumPy's, and tensors that hold a single one."""

from __future__ import annotations

import operator
from typing import Any

import torch


def as_integer(value: Any) -> int | None:
    """The integer that `value` is; None for anything else, a bool or a float among them."""
    if isinstance(value, bool) or getattr(value, "dtype", None) == torch.bool:
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def as_number(value: Any) -> float | None:
    """The real number that `value` is, an integer included; None for a bool or anything else."""
    integer = as_integer(value)
    if integer is not None:
        return float(integer)
    is_float = isinstance(value, float) or "float" in str(getattr(value, "dtype", ""))
    if not is_float or getattr(value, "ndim", 0) != 0:
        return None
    return float(value)


def shown(value: object) -> object:
    """`value` as an error message shows it: text in quotes, or "got 8" would seem to be right."""
    return repr(value) if isinstance(value, str) else value
