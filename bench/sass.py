"""Counts the instructions that a kernel's main loop issues, from its machine code (SASS).

The count is of the cheapest way through the loop that loads a whole tile of eight 16-byte vectors
and takes an exponential of every element: aligned rows, no suppressed token, no NaN, and the
branches of rare elements not taken. A lane does this once per tile, so a count divided by eight is
the count per 16 bytes of logits.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

VECTORS = 8  # of a tile, per lane: kVectors of csrc/cuda/tile.cuh

LINE = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?);")
PARTS = re.compile(r"(?:@(!?U?P\w+)\s+)?(\S+)\s*(.*)")
TARGET = re.compile(r"(0x[0-9a-f]+)\s*$")

# Executed on the ALU pipe, which takes a warp's instruction in two cycles; the FMA pipe and the
# issue of an instruction take one (CUDA C++ Programming Guide, table of arithmetic throughput,
# compute capability 9.0)
# fmt: off
ALU = {
    "BMSK", "F2FP", "FCHK", "FMNMX", "FSEL", "FSET", "FSETP", "HMNMX2", "IABS", "IADD", "IADD3",
    "IMNMX", "ISETP", "LEA", "LOP", "LOP3", "MOV", "P2R", "PLOP3", "PRMT", "R2P", "SEL", "SGXT",
    "SHF", "VHMNMX", "VIADD", "VIADDMNMX", "VIMNMX",
}
# fmt: on


@dataclass(frozen=True)
class Instruction:
    address: int
    text: str
    guarded: bool  # by a predicate other than PT
    opcode: str  # such as LDG.E.128
    target: int | None  # of a branch

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]


@dataclass(frozen=True)
class Count:
    """Instructions of one way through the code, by what limits them."""

    instructions: int = 0
    mufu: int = 0  # exponentials, logarithms, reciprocals: 16 lanes a cycle and multiprocessor
    alu: int = 0

    def __add__(self, other: Count) -> Count:
        return Count(
            self.instructions + other.instructions, self.mufu + other.mufu, self.alu + other.alu
        )


def cuobjdump() -> str | None:
    if path := shutil.which("cuobjdump"):
        return path
    if spec := importlib.util.find_spec("triton"):
        path = Path(spec.origin or "").parent / "backends/nvidia/bin/cuobjdump"
        if path.is_file():
            return str(path)
    return None


@functools.cache
def machine_code(library: Path, architecture: str) -> dict[str, list[Instruction]]:
    """Mangled name of every kernel of the library -> its instructions."""
    tool = cuobjdump()
    if tool is None:
        raise FileNotFoundError("no cuobjdump: neither a CUDA toolkit with it nor Triton is here")
    command = [tool, "-sass", "-arch", architecture, str(library)]
    dump = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    kernels: dict[str, list[Instruction]] = {}
    instructions: list[Instruction] = []
    for line in dump.splitlines():
        if "Function :" in line:
            instructions = kernels.setdefault(line.split("Function :")[1].strip(), [])
        elif match := LINE.match(line):
            instructions.append(parse(int(match[1], 16), match[2].strip()))
    return kernels


def parse(address: int, text: str) -> Instruction:
    guard, opcode, rest = PARTS.fullmatch(text).groups()  # type: ignore[union-attr]
    target = TARGET.search(rest) if opcode.split(".")[0] == "BRA" else None
    # A branch may carry a second predicate: @!P0 BRA P2, 0x40
    second = opcode.startswith("BRA") and not opcode.startswith("BRA.DIV") and "," in rest
    return Instruction(
        address, text, bool(guard) or second, opcode, int(target[1], 16) if target else None
    )


# ---- Control flow ----


@dataclass
class Block:
    instructions: list[Instruction]
    next: list[int]  # indices of the blocks that may follow
    leaves: bool = False  # the kernel may end here

    def wide(self, name: str) -> int:
        return sum(each.name == name and ".128" in each.opcode for each in self.instructions)


def blocks_of(code: Sequence[Instruction]) -> list[Block]:
    """Basic blocks. A call counts as its own instruction; BRA.DIV, the way of a warp that has
    diverged at a shuffle, is never taken."""
    ends = ("BRA", "EXIT", "RET", "BRX", "JMP")
    leaders = {code[0].address}
    for here, after in zip(code, [*code[1:], None], strict=True):
        if here.name in ends:
            if here.target is not None:
                leaders.add(here.target)
            if after:
                leaders.add(after.address)
    starts = sorted(leaders)
    index_of = {address: index for index, address in enumerate(starts)}
    blocks = [Block([], []) for _ in starts]
    block = blocks[0]
    for each in code:
        block = blocks[index_of[each.address]] if each.address in index_of else block
        block.instructions.append(each)
    for index, block in enumerate(blocks):
        last = block.instructions[-1]
        taken = last.name == "BRA" and not last.opcode.startswith("BRA.DIV")
        if taken and last.target != last.address:  # kernels end with a branch to itself
            block.next.append(index_of[last.target])  # type: ignore[index]
        goes_on = last.name not in ends or last.guarded or not (taken or last.name != "BRA")
        if goes_on and index + 1 < len(blocks):
            block.next.append(index + 1)
        block.leaves = last.name == "EXIT"
    return blocks


def order_of(blocks: Sequence[Block]) -> dict[int, int]:
    """Reverse postorder of the blocks that can be reached."""
    finished: list[int] = []
    seen, stack = {0}, [(0, iter(blocks[0].next))]
    while stack:
        index, following = stack[-1]
        for each in following:
            if each not in seen:
                seen.add(each)
                stack.append((each, iter(blocks[each].next)))
                break
        else:
            finished.append(index)
            stack.pop()
    return {index: place for place, index in enumerate(reversed(finished))}


def loops_of(blocks: Sequence[Block], order: dict[int, int]) -> dict[int, set[int]]:
    """Head of every loop -> the blocks of the loop."""
    before: dict[int, list[int]] = {index: [] for index in order}
    for index in order:
        for each in blocks[index].next:
            before[each].append(index)
    loops: dict[int, set[int]] = {}
    for index in order:
        for head in blocks[index].next:
            if order[head] > order[index]:
                continue
            body, left = {head}, [index]
            while left:
                each = left.pop()
                if each not in body:
                    body.add(each)
                    left += [one for one in before[each] if order[one] > order[head]]
            loops.setdefault(head, set()).update(body)
    return loops


def count_of(instructions: Sequence[Instruction]) -> Count:
    real = [each for each in instructions if each.name != "NOP"]
    return Count(
        len(real), sum(each.name == "MUFU" for each in real), sum(each.name in ALU for each in real)
    )


def cheapest(
    blocks: Sequence[Block],
    order: dict[int, int],
    inside: set[int],
    head: int,
    loads: str,
    exponentials: int,
) -> Count | None:
    """The cheapest way from `head` back to it, or to the kernel's end where `inside` is no loop,
    with eight wide `loads`, as many wide stores as eight such loads can have, and that many
    exponentials."""
    State = tuple[int, int, int]  # wide loads, wide stores, exponentials
    states: dict[int, dict[State, Count]] = {head: {(0, 0, 0): Count()}}
    ways: dict[State, Count] = {}

    def keep(into: dict[State, Count], state: State, count: Count) -> None:
        if state not in into or count.instructions < into[state].instructions:
            into[state] = count

    for index in sorted(inside, key=order.__getitem__):
        block = blocks[index]
        added = count_of(block.instructions)
        wide = block.wide(loads), block.wide("STG")
        powers = sum(each.opcode.startswith("MUFU.EX2") for each in block.instructions)
        for state, count in states.get(index, {}).items():
            if state[0] + wide[0] > VECTORS:
                continue
            after = (
                state[0] + wide[0],
                min(state[1] + wide[1], VECTORS),
                min(state[2] + powers, exponentials),
            )
            if head in block.next or (block.leaves and head == 0):
                keep(ways, after, count + added)
            for each in block.next:
                if each in inside and order[each] > order[index]:
                    keep(states.setdefault(each, {}), after, count + added)
    whole = {state: way for state, way in ways.items() if state[0] == VECTORS}
    if not whole:
        return None
    most = max((state[2], state[1]) for state in whole)
    return min(
        (way for state, way in whole.items() if (state[2], state[1]) == most),
        key=lambda way: way.instructions,
    )


def per_tile(code: Sequence[Instruction], width: int) -> Count | None:
    """What a warp issues for a tile, of `width` elements per vector: the loop that loads it and, if
    there is one, the loop that writes its gradient. None if the kernel has no such loop."""
    blocks = blocks_of(code)
    order = order_of(blocks)
    loops = loops_of(blocks, order)
    total, found = Count(), False
    for head in sorted(loops, key=order.__getitem__):
        body = loops[head]
        inner = [other for other in loops if other != head and other in body]
        for loads in ("LDG", "LDS"):
            if sum(blocks[index].wide(loads) for index in body) < VECTORS:
                continue
            if loads == "LDS" and not any(blocks[index].wide("STG") for index in body):
                continue
            if any(
                sum(blocks[index].wide(loads) for index in loops[other]) >= VECTORS
                for other in inner
            ):
                continue  # the inner loop is the one
            way = cheapest(blocks, order, body, head, loads, VECTORS * width)
            if way is not None:
                total, found = total + way, True
    if found:
        return total
    return cheapest(blocks, order, set(order), 0, "LDG", VECTORS * width)
