"""``python -m dmax_kernels bench``: one op at one shape, beside the eager PyTorch it replaces."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from dmax_kernels.bench.timer import Machine, measure
from dmax_kernels.bench.workload import DTYPES, VALUES, WORKLOADS, Inputs, Work
from dmax_kernels.cli.info import collect
from dmax_kernels.files import check_output, save_json

EPILOGUE = """\
Candidates run in turn, so compare them within a run, never runs. On a GPU: calls of one graph that
goes round more inputs than the L2 cache holds. "of bandwidth" is the least time to move the op's
bytes, measured beside it, over its own.

  python -m dmax_kernels bench                                      what there is
  python -m dmax_kernels bench top1_confidence                      32 x 157184, bfloat16
  python -m dmax_kernels bench top1_confidence --shape 256x32000 --dtype float32 --compile
  python -m dmax_kernels bench spd_step_ --shape 4x32 --values peaked --json step.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOGUE
    parser.add_argument("op", nargs="?", metavar="OP", help="left out: lists the ops")
    parser.add_argument(
        "--shape",
        default="",
        help="sizes, as 32x157184; the first ones suffice (default: what `bench` alone lists)",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="bfloat16", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--values", choices=VALUES, default="flat",
        help="flat: logits of a model that is not sure; peaked: of one that is (default: flat)",
    )  # fmt: skip
    parser.add_argument(
        "--device", choices=("cpu", "cuda"),
        default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--compile", action="store_true", help="time torch.compile of the eager reference, too"
    )
    parser.add_argument(
        "--repetitions", type=int, default=20, metavar="N", help="(default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads of every candidate")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here, too")


def run(options: argparse.Namespace) -> int:
    if options.op is None:
        width = max(map(len, WORKLOADS))
        for name, workload in WORKLOADS.items():
            sizes = "x".join(map(str, workload.sizes.values()))
            print(f"{name:<{width}}  {workload.shape_names} = {sizes}")
        return 0
    if options.op not in WORKLOADS:
        raise ValueError(f"no benchmark of {options.op!r}; there are: {', '.join(WORKLOADS)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch sees no GPU")
    if options.repetitions < 5:
        raise ValueError(f"--repetitions must be at least 5, got {options.repetitions}")
    if options.threads is not None and options.threads < 1:
        raise ValueError(f"--threads must be at least 1, got {options.threads}")
    if options.json is not None:
        check_output("--json", options.json)
    if options.threads:
        torch.set_num_threads(options.threads)
    workload, sizes = WORKLOADS[options.op], parse_shape(options.shape)

    def make() -> Work:
        return workload.work(Inputs(DTYPES[options.dtype], options.device, options.values), sizes)

    result = measure(
        make,
        Machine(options.device),
        repetitions=options.repetitions,
        compiled=("torch.compile",) if options.compile else (),
    )
    shape = " x ".join(map(str, workload.all_sizes(sizes)))
    print(f"{options.op}, {shape} ({workload.shape_names}), {options.dtype}, {options.values}")
    print(table(result))
    if options.json:
        what = {"op": options.op, "shape": shape, "dtype": options.dtype, "values": options.values}
        save_json(options.json, {"machine": collect(), "case": what, **result})
    return 0


def parse_shape(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(part) for part in text.split("x")) if text else ()
    except ValueError:
        sizes = (0,)
    if any(not 0 < size < 2**63 for size in sizes):
        need = "positive numbers below 2^63 joined by x, as 32x157184"
        raise ValueError(f"--shape must be {need}, got {text}")
    return sizes


def table(result: dict) -> str:
    """One line per candidate; below, how much of the machine's rate ours reaches."""
    rows = result["candidates"]
    width = max(map(len, rows))
    lines = [f"{'':<{width}}  {'median':>12}  {'spread':>6}  {'speed-up':>8}"]
    for name, row in rows.items():
        figures = f"{row['us']:>9.1f} us  {row['spread']:>6.0%}  {row.get('speed-up', 0):>7.2f}x"
        lines.append(f"{name:<{width}}  {figures}")
    if not result["bytes"]:  # a loop
        return "\n".join(lines)
    reached = f"fused: {result['GB/s']} GB/s, {result['share of bandwidth']:.0%} of bandwidth"
    if "GFLOP/s" in result:
        reached += f"; {result['GFLOP/s']} GFLOP/s, "
        reached += f"{result['share of matrix rate']:.0%} of a plain product's rate"
    return "\n".join([*lines, reached])
