"""Repeats recorded kernel calls: `simt_replay_child.py MODULE CALLS ORDER RESIDENT`.

Started by test_simt_sanitizers.py under a sanitizer, which ends the process where it finds a bug.
The results must have the bits that the plain build gave.
"""

import pickle
import sys

from simt_arrays import arrays_in, memory_of, resolve, restore
from simt_build import load_from


def main(module_path: str, calls_path: str, order: str, resident: str) -> None:
    simt = load_from(module_path)
    simt.set_options(order, 1, int(resident))
    with open(calls_path, "rb") as file:
        recorded = pickle.load(file)
    for name, arguments, expected in recorded:
        arguments = restore(arguments)
        getattr(simt, name)(*(resolve(simt, each) for each in arguments))
        actual = [memory_of(each) for each in arrays_in(arguments)]
        for index, (bits, other) in enumerate(zip(actual, expected, strict=True)):
            if bits != other:
                sys.exit(f"{name}: array {index} differs from the plain build's")
    print(len(recorded), "calls")


if __name__ == "__main__":
    main(*sys.argv[1:])
