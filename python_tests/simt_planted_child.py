"""Runs one planted kernel in a Python of its own.

`simt_planted_child.py MODULE NAME FIXED ORDER [BLOCKS CLUSTER]` is started by test_simt_executor.py
under a sanitizer, which ends the process where it finds the bug.
"""

import sys

from simt_build import load_from


def main(module_path: str, name: str, fixed: str, order: str, *grid: str) -> None:
    simt = load_from(module_path)
    simt.set_options(order, 1, 4)
    if name == "last_block_sums":
        print(simt.run_last_block_sums(int(fixed), 4))
    else:
        print(simt.run_planted(name, fixed == "1", *map(int, grid)))


if __name__ == "__main__":
    main(*sys.argv[1:])
