"""Keeps what ptxas says of every kernel: registers, shared memory, spills.

As a compiler launcher, ``compile_report.py -- nvcc ... -o X.o``, it runs the compiler, saves
ptxas's lines as ``X.o.ptxas`` and passes on everything else. ``--merge`` makes one JSON of them.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(sm_\w+)'")
STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")


def launch(command: list[str]) -> int:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    mine, others = [], []
    for line in done.stdout.splitlines():
        is_ptxas = line.startswith("ptxas info") or "bytes stack frame" in line
        (mine if is_ptxas else others).append(line)
    if "-o" in command and mine:
        output = Path(command[command.index("-o") + 1])
        output.with_name(output.name + ".ptxas").write_text("\n".join(mine) + "\n")
    if others:
        print("\n".join(others), file=sys.stderr)
    return done.returncode


def demangle(names: list[str]) -> list[str]:
    try:
        done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True)
    except FileNotFoundError:
        return names
    return done.stdout.splitlines() if done.returncode == 0 else names


def short_name(demangled: str) -> str:
    """void dmax::cuda::topk_rows_kernel<dmax::BFloat16>(...) -> topk_rows_kernel<BFloat16>"""
    name = demangled.removeprefix("void ").replace("dmax::cuda::", "").replace("dmax::", "")
    name = re.sub(r"\(\w+\)(?=\d)", "", name)  # the type before an enum's number
    return name.split("(", 1)[0].replace("(", "").replace("> >", ">>")  # either, by the tool's age


def parse(text: str) -> list[dict]:
    """One entry per kernel and architecture; a called function's stack counts as its kernel's."""
    kernels: list[dict] = []
    for line in text.splitlines():
        if match := ENTRY.search(line):
            kernels.append({"kernel": match[1], "architecture": match[2], "registers": 0,
                            "shared_bytes": 0, "stack_bytes": 0, "spill_bytes": 0})  # fmt: skip
        elif not kernels:
            continue
        elif match := STACK.search(line):
            kernels[-1]["stack_bytes"] += int(match[1])
            kernels[-1]["spill_bytes"] += int(match[2]) + int(match[3])
        elif match := USED.search(line):
            kernels[-1]["registers"] = int(match[1])
            shared = SHARED.search(line)
            kernels[-1]["shared_bytes"] = int(shared[1]) if shared else 0
    for kernel, name in zip(kernels, demangle([k["kernel"] for k in kernels]), strict=True):
        kernel["kernel"] = short_name(name)
    return kernels


def main(arguments: list[str]) -> int:
    if arguments and arguments[0] == "--":
        return launch(arguments[1:])
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--merge", type=Path, required=True, help="folder with *.ptxas")
    parser.add_argument("--architectures", required=True)
    parser.add_argument("--compiler", required=True)
    parser.add_argument("--torch-target", required=True)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    reports = sorted(options.merge.rglob("*.cu.o.ptxas"))
    kernels = [kernel for path in reports for kernel in parse(path.read_text())]
    report = {
        "architectures": options.architectures.split(),
        "compiler": options.compiler,
        "torch_target": options.torch_target,
        "kernels": sorted(kernels, key=lambda k: (k["kernel"], k["architecture"])),
    }
    options.output.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
