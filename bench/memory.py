"""``python bench/memory.py``: peak bytes of the OPUT loss over the LM head, forward and backward.

Per size, on top of the inputs (hidden states, head, targets) and with the gradients of all of them:

    eager        both passes jointly: two cross-entropies of stored logits, one backward pass
    alternating  one of the passes, as released training code does per micro-batch
    fused        both passes jointly by dmax_kernels.linear_oput_loss

On the CPU each figure is how far the high-water mark of a separate process rose above what it held
before; on a GPU it is the allocator's. With --output, JSON and a picture are written.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import dmax_kernels  # noqa: E402
from bench.machine import machine_facts  # noqa: E402
from dmax_kernels.bench.workload import DIM, DTYPES, VOCAB  # noqa: E402

WAYS = ("eager", "alternating", "fused")
MEGABYTE = 1e6


def step(way: str, hidden: list[torch.Tensor], weight: torch.Tensor, target: torch.Tensor) -> None:
    if way == "fused":
        loss = dmax_kernels.linear_oput_loss(*hidden, weight, target, reduction="mean")
    else:
        used = hidden if way == "eager" else hidden[:1]
        loss = sum(F.cross_entropy((h @ weight.t()).float(), target) for h in used)
    loss.backward()


def inputs(rows: int, dim: int, vocab: int, dtype: torch.dtype, device: str):
    """Made in place, since a temporary copy would raise the mark before the step does."""

    def normal(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_().requires_grad_()

    weight = torch.empty(vocab, dim, dtype=dtype, device=device).normal_(std=dim**-0.5)
    target = torch.randint(0, vocab, (rows,), device=device)
    return [normal(rows, dim) for _ in range(2)], weight.requires_grad_(), target


def gradient_bytes(rows: int, dim: int, vocab: int, dtype: str) -> int:
    """The gradients of both hidden states and the head; no way can take less."""
    return (2 * rows + vocab) * dim * DTYPES[dtype].itemsize


def high_water() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_bytes(way: str, rows: int, dim: int, vocab: int, dtype: str) -> int:
    """Peak bytes of this process, which must not have done anything else before."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    step(way, *inputs(8, dim, 512, DTYPES[dtype], device))  # libraries and threads start up
    arguments = inputs(rows, dim, vocab, DTYPES[dtype], device)
    if device == "cpu":
        before = high_water()
        step(way, *arguments)
        return high_water() - before
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(way, *arguments)
    return torch.cuda.max_memory_allocated() - before


def measured(way: str, rows: int, options: argparse.Namespace) -> int:
    """peak_bytes() in a fresh process."""
    command = [sys.executable, __file__, "--measure", way, "--rows", str(rows)]
    for name in ("dim", "vocab", "dtype", "threads"):
        command += [f"--{name}", str(getattr(options, name))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"memory: {way} at {rows} rows failed:\n{done.stderr[-2000:]}")
    return int(done.stdout)


def main() -> None:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--rows", type=int, nargs="+",
        default=[512, 1024, 2048, 4096] if on_gpu else [64, 128, 256, 512],
        help="positions, each with two passes",
    )  # fmt: skip
    parser.add_argument("--dim", type=int, default=DIM if on_gpu else 256)
    parser.add_argument("--vocab", type=int, default=VOCAB)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--measure", choices=WAYS, help="one figure, in this process")
    parser.add_argument("--output", type=Path, help="write JSON here, a picture beside it")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.measure:
        sizes = (options.rows[0], options.dim, options.vocab, options.dtype)
        print(peak_bytes(options.measure, *sizes))
        return

    print(f"D = {options.dim}, V = {options.vocab}, {options.dtype}; MB of gradients, MB in all")
    memory = []
    for rows in options.rows:
        gradients = gradient_bytes(rows, options.dim, options.vocab, options.dtype)
        for way in WAYS:
            entry = {"way": way, "rows": rows, "gradients": gradients}
            memory.append(entry | {"bytes": measured(way, rows, options)})
            print(
                f"{way:<12} 2 x {rows:<6} {gradients / MEGABYTE:>9.1f} "
                f"{memory[-1]['bytes'] / MEGABYTE:>9.1f}", flush=True,
            )  # fmt: skip
    if options.output:
        sizes = {name: getattr(options, name) for name in ("dim", "vocab", "dtype", "threads")}
        record = {"machine": machine_facts(), "sizes": sizes, "memory": memory}
        options.output.write_text(json.dumps(record, indent=1) + "\n")
        from bench.pictures import draw_memory

        draw_memory(record, options.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
