"""Loops of one parallel region (csrc/cpu/parallel.h): no data race, and no deadlock.

With fewer threads than shares, a thread has to take the shares of those that never come.
"""

import subprocess
from pathlib import Path

from simt_build import CSRC, SANITIZER_OPTIONS, compiler, run_checked


def test_loops_under_thread_sanitizer(tmp_path):
    # In place of LibTorch's headers: the program has a parallel_for of its own
    stand_in = tmp_path / "common" / "torch_stable.h"
    stand_in.parent.mkdir()
    stand_in.write_text("#pragma once\n")
    program = tmp_path / "parallel_loops"
    source = Path(__file__).with_name("parallel_loops.cpp")
    run_checked(
        [compiler(), "-std=c++17", "-O1", "-g1", "-fsanitize=thread", "-Wall", "-Wextra",
         f"-I{tmp_path}", f"-I{CSRC}", str(source), "-o", str(program), "-pthread"]
    )  # fmt: skip
    # Its shadow memory has no room for a randomised layout
    done = subprocess.run(
        ["setarch", "-R", str(program)],
        capture_output=True, text=True, env=SANITIZER_OPTIONS, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
