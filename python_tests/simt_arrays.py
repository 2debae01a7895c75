"""Arrays as arguments of the executor's module; numpy only, for the sanitizers' processes.

An argument is an array (passed as its address), a tuple ("LogitsInput", ...) (that struct of the
module), None (a null address), or a plain value.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np


def address_of(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def memory_of(array: np.ndarray) -> bytes:
    """Everything between the array's first and last byte, gaps of its strides included."""
    if array.size == 0:
        return b""
    steps = zip(array.shape, array.strides, strict=True)
    extent = array.itemsize + sum((n - 1) * stride for n, stride in steps)
    return ctypes.string_at(address_of(array), extent)


@dataclass
class Memory:
    """An array's memory on its way to another process, with its place within 16 bytes."""

    lead: int
    data: bytes

    def allocate(self) -> np.ndarray:
        """The array in an allocation that ends with it, so that AddressSanitizer sees overruns."""
        block = np.zeros(self.lead + len(self.data), np.uint8)
        assert address_of(block) % 16 == 0
        block[self.lead :] = np.frombuffer(self.data, np.uint8)
        return block[self.lead :]


def snapshot(argument):
    if isinstance(argument, np.ndarray):
        return Memory(address_of(argument) % 16, memory_of(argument))
    if isinstance(argument, tuple):
        return tuple(snapshot(each) for each in argument)
    return argument


def restore(argument):
    if isinstance(argument, Memory):
        return argument.allocate()
    if isinstance(argument, tuple):
        return tuple(restore(each) for each in argument)
    return argument


def resolve(module, argument):
    if argument is None:
        return 0
    if isinstance(argument, np.ndarray):
        return address_of(argument)
    if isinstance(argument, tuple):
        return getattr(module, argument[0])(*(resolve(module, each) for each in argument[1:]))
    return argument


def arrays_in(arguments) -> list[np.ndarray]:
    found = []
    for each in arguments:
        if isinstance(each, np.ndarray):
            found.append(each)
        elif isinstance(each, tuple):
            found += arrays_in(each)
    return found
