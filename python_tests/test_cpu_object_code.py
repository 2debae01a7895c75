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
    ("sum_exp", "Float16"): ("vpslld", 1),
    ("entropy_sums", "float"): ("vpslld", 1),
    ("entropy_sums", "BFloat16"): ("vpslld", 2),
    ("entropy_sums", "Float16"): ("vpslld", 1),
    ("softmax_grad", "float"): ("vpslld", 1),
    ("softmax_grad", "BFloat16"): ("vpslld", 2),
    ("softmax_grad", "Float16"): ("vpslld", 1),
    ("maximum", "float"): ("vmaxps", 2),
    ("maximum_of_bits", "BFloat16"): ("vpmaxsw", 2),
}
# (function, template argument) of dot_products.cpp, and the least products in its main loop: four
# pairs of columns x eight tokens x two panels of rows; eight tokens of one row, or four of more
DOT_PRODUCTS = {
    ("add_group", "true"): 64,
    ("add_group", "false"): 64,
    ("multiply_few", "1"): 8,
    ("multiply_few", "2"): 8,
    ("multiply_few", "3"): 12,
    ("multiply_few", "4"): 16,
}
# Instructions for sixteen exponentials and their sum. AVX2: 2 x (load, difference, scale, eleven of
# exp2, a copy, the sum) and the loop's own; AVX-512 needs half as many.
MOST_FOR_SUM_EXP = {"avx2": 38, "avx512": 22}


@pytest.fixture(scope="module")
def code():
    """{(function, element, instruction set): lines of its code}."""
    if OBJDUMP is None:
        pytest.skip("no objdump here (Debian: apt-get install binutils)")
    library = _library._find(_library.CPU_LIBRARY)
    if b"clang version" in library.read_bytes():
        pytest.skip("clang built the library: it spills constants of the AVX2 loops")
    command = [OBJDUMP, "-d", "-C", "--no-show-raw-insn", str(library)]
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


def main_loop(code, function, element, instruction_set, instruction, least):
    if (function, element, instruction_set) not in code:
        pytest.skip(f"{function} was compiled into its callers")
    candidates = [
        loop
        for loop in loops(code[function, element, instruction_set])
        if sum(instruction in line for line in loop) >= least
    ]
    return min(candidates, key=len)


@pytest.mark.parametrize("instruction_set", ["avx2", "avx512"])
@pytest.mark.parametrize(("function", "element"), LOOPS, ids=str)
def test_no_spills(code, function, element, instruction_set):
    loop = main_loop(code, function, element, instruction_set, *LOOPS[function, element])
    assert not [line for line in loop if STACK.search(line)], "\n".join(loop)


@pytest.mark.parametrize(("function", "argument"), DOT_PRODUCTS, ids=str)
def test_no_spills_in_bfloat16_products(code, function, argument):
    least = DOT_PRODUCTS[function, argument]
    loop = main_loop(code, function, argument, "avx512bf16", "vdpbf16ps", least)
    assert not [line for line in loop if STACK.search(line)], "\n".join(loop)


@pytest.mark.parametrize("instruction_set", MOST_FOR_SUM_EXP)
def test_instructions_of_the_exponential(code, instruction_set):
    loop = main_loop(code, "sum_exp", "float", instruction_set, *LOOPS["sum_exp", "float"])
    assert len(loop) <= MOST_FOR_SUM_EXP[instruction_set], "\n".join(loop)
