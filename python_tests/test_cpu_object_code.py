"""The CPU's streaming loops, read from the object code: no spills, and few instructions."""

import re
import shutil
import subprocess

import pytest

from dmax_kernels import _library

OBJDUMP = shutil.which("objdump")
STACK = re.compile(r"\(%r[sb]p\b")
# (function, element) -> the instruction by which its main loop is recognised, and the least count
# of it: a loop over single vectors has half as many maxima
LOOPS = {
    ("sum_exp", "float"): ("vpslld", 1),
    ("sum_exp", "BFloat16"): ("vpslld", 2),  # also widened by a shift
    ("softmax_grad", "float"): ("vpslld", 1),
    ("maximum", "float"): ("vmaxps", 2),
    ("maximum_of_bits", "BFloat16"): ("vpmaxsw", 2),
}
# Instructions for sixteen exponentials and their sum. AVX2: 2 x (load, difference, scale, eleven of
# exp2, a copy, the sum) and the loop's own; AVX-512 needs half as many.
MOST_FOR_SUM_EXP = {"avx2": 38, "avx512": 22}


@pytest.fixture(scope="module")
def code():
    """{(function, element, instruction set): lines of its code}."""
    if OBJDUMP is None:
        pytest.skip("no objdump here (Debian: apt-get install binutils)")
    command = [OBJDUMP, "-d", "-C", "--no-show-raw-insn", str(_library._find(_library.CPU_LIBRARY))]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    name = r"cpu::(avx\w+)::\(anonymous namespace\)::(\w+)<(?:dmax::)?(\w+)>"
    found = {}
    for function in text.split("\n\n"):
        heading, _, body = function.partition("\n")
        named = re.search(name, heading)
        if named:
            found[named[2], named[3], named[1]] = body.splitlines()
    if not found:
        pytest.skip("the library has no AVX code, or was stripped of its symbols")
    return found


def loops(lines):
    """Stretches of code that end in a jump back to their beginning."""
    places = {int(line.split(":")[0], 16): i for i, line in enumerate(lines)}
    for i, line in enumerate(lines):
        jump = re.search(r"\tj\w+\s+([0-9a-f]+)\b|\sj\w+\s+([0-9a-f]+)\b", line)
        start = places.get(int(jump[1] or jump[2], 16)) if jump else None
        if start is not None and start <= i:
            yield lines[start : i + 1]


def main_loop(code, function, element, instruction_set):
    if (function, element, instruction_set) not in code:
        pytest.skip(f"{function} was compiled into its callers")
    instruction, least = LOOPS[function, element]
    candidates = [
        loop
        for loop in loops(code[function, element, instruction_set])
        if sum(instruction in line for line in loop) >= least
    ]
    return min(candidates, key=len)


@pytest.mark.parametrize("instruction_set", ["avx2", "avx512"])
@pytest.mark.parametrize(("function", "element"), LOOPS, ids=str)
def test_no_spills(code, function, element, instruction_set):
    loop = main_loop(code, function, element, instruction_set)
    assert not [line for line in loop if STACK.search(line)], "\n".join(loop)


@pytest.mark.parametrize("instruction_set", MOST_FOR_SUM_EXP)
def test_instructions_of_the_exponential(code, instruction_set):
    loop = main_loop(code, "sum_exp", "float", instruction_set)
    assert len(loop) <= MOST_FOR_SUM_EXP[instruction_set], "\n".join(loop)
