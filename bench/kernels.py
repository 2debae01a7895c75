"""``python bench/kernels.py`` (``make kernels-report``): what nvcc made of the CUDA kernels.

For every kernel over vocabulary rows: instructions per 16 bytes of logits, registers, shared
memory, blocks per multiprocessor, and the time of the instructions beside that of the bytes on an
H100 and an H200. Then every GPU target of the design beside the time that follows and the one that
was measured. It needs the library that nvcc made, and no GPU.

    --json PATH   writes all of it as JSON
    --keep        renews bench/kernel_counts.json, to which the tests hold the counts, and
                  bench/results/gpu-predicted.md
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench import sass  # noqa: E402
from bench.cases import DIM, GPU_CASES, VOCAB  # noqa: E402

LIBRARY = ROOT / "dmax_kernels" / "lib" / "libdmax_cuda.so"
COUNTS = ROOT / "bench" / "kernel_counts.json"
PREDICTED = ROOT / "bench" / "results" / "gpu-predicted.md"
MEASURED = ROOT / "bench" / "results" / "gpu-h100.json"
ARCHITECTURE = "sm_90a"
TILE_BYTES = 4096  # that a warp loads at once


@dataclass(frozen=True)
class Gpu:
    """What a prediction needs. The data sheets give the multiprocessors and the clocks, at which
    kernels bound by memory run; the bandwidths are those of copies that others report."""

    name: str
    multiprocessors: int
    hertz: float
    bandwidth: float

    def bytes_seconds(self, size: float) -> float:
        return size / self.bandwidth

    def limits(self, count: sass.Count, tiles: float) -> dict[str, float]:
        """Seconds that each of a multiprocessor's parts needs for its tiles: four schedulers issue
        an instruction a cycle each, 16 lanes do special functions, 64 lanes the ALU's."""
        cycles = {
            "issue": count.instructions / 4,
            "MUFU": count.mufu * 32 / 16,
            "ALU": count.alu * 32 / 64,
        }
        return {name: each * tiles / self.hertz for name, each in cycles.items()}


GPUS = (Gpu("H100", 132, 1.755e9, 3.0e12), Gpu("H200", 132, 1.98e9, 4.3e12))

# Streaming kernels -> bytes moved for each tile that is read
TRAFFIC = {
    "top1_rows_kernel": 1,
    "topk_rows_kernel": 1,
    "row_statistics_kernel": 1,
    "token_logprobs_kernel": 1,
    "sample_rows_kernel": 1,
    "spd_step_kernel": 1,
    "edit_step_kernel": 1,
    "oput_loss_kernel": 1,
    "oput_loss_backward_kernel": 2,
    "loss_and_grad_cluster_kernel": 2,
    "loss_and_grad_two_pass_kernel": 3,
}
THREADS = {
    "prefix_promote_kernel": 128,
    "merge_shards_kernel": 128,
    "hybrid_backward_positions_kernel": 128,
    "hybrid_backward_tokens_kernel": 128,
    "hybrid_backward_mask_slices_kernel": 128,
    "hybrid_backward_mask_row_kernel": 128,
}  # of a block; 256 elsewhere
CLUSTERED = ("top1_rows_kernel", "row_statistics_kernel", "sample_rows_kernel", "spd_step_kernel")


@dataclass(frozen=True)
class Kernel:
    name: str
    registers: int
    shared_bytes: int  # static
    count: sass.Count | None  # per tile; None for a kernel that streams no rows

    @property
    def base(self) -> str:
        return self.name.split("<")[0]

    @property
    def threads(self) -> int:
        """Of a block. Kernels with a cluster per row have ten warps."""
        cluster = self.base == "loss_and_grad_cluster_kernel" or (
            self.base in CLUSTERED and self.name.endswith("true>")
        )
        return 320 if cluster else THREADS.get(self.base, 256)

    @property
    def width(self) -> int:
        """Elements of 16 bytes."""
        return 4 if re.search(r"<float\b", self.name) else 8

    @property
    def moved(self) -> int:
        return TRAFFIC[self.base] * TILE_BYTES

    def resident(self, threads: int = 0, dynamic_bytes: int = 0) -> int:
        """Blocks that share a multiprocessor of sm_90: 64 K registers handed out to warps in 256s,
        2,048 threads, 227 KB of shared memory of which each block takes another 1 KB."""
        threads = threads or self.threads
        warps = threads // 32
        registers = math.ceil(self.registers * 32 / 256) * 256 * warps
        shared = self.shared_bytes + dynamic_bytes + 1024
        return min(2048 // threads, 65536 // registers, 228 * 1024 // shared, 32)

    def busiest(self, gpu: Gpu) -> tuple[float, str]:
        """The busiest part of a multiprocessor, and its time as a share of the bytes' time. Above
        1 it bounds the kernel, below 1 the bytes do."""
        assert self.count is not None
        limits = gpu.limits(self.count, 1)
        part = max(limits, key=limits.__getitem__)
        return limits[part] / (gpu.bytes_seconds(self.moved) * gpu.multiprocessors), part


def kernels_of(library: Path = LIBRARY) -> tuple[list[Kernel], str]:
    """The library's kernels for sm_90a, and the compiler that made them."""
    report = json.loads(library.with_suffix(".json").read_text())
    tool = compile_report()
    code = sass.machine_code(library, ARCHITECTURE)
    shorts = map(tool.short_name, tool.demangle(list(code)))
    by_name = dict(zip(shorts, code.values(), strict=True))
    kernels = []
    for row in report["kernels"]:
        if row["architecture"] != ARCHITECTURE:
            continue
        kernel = Kernel(row["kernel"], row["registers"], row["shared_bytes"], None)
        if kernel.base in TRAFFIC:
            count = sass.per_tile(by_name[kernel.name], kernel.width)
            kernel = Kernel(kernel.name, kernel.registers, kernel.shared_bytes, count)
        kernels.append(kernel)
    return kernels, report["compiler"]


def compile_report() -> Any:
    path = ROOT / "csrc" / "cuda" / "compile_report.py"
    spec = importlib.util.spec_from_file_location("compile_report", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- The design's targets ----

LAUNCH = 2.0  # us, of a kernel in a graph
LATENCY = 0.6  # us, of one load from memory that the next step waits for
ARRIVAL = 1.4  # us, of a block that counts itself in and reads what the others left
BARRIER = 0.5  # us, of a cluster


@dataclass(frozen=True)
class Target:
    """A row of the design's table of GPU targets, and what its time is made of."""

    workload: str
    sizes: tuple[int, ...]
    kernels: dict[str, int]  # name -> rows of VOCAB that it streams
    chain: float  # us of latencies that nothing hides: the launches, and steps after the stream
    in_the_way: str
    flops: float = 0.0  # of Triton's matrix products
    flops_rate: float = 720e12  # a second: the level published for Hopper
    other_bytes: float = 0.0

    def predicted_us(self, gpu: Gpu, kernels: dict[str, Kernel]) -> float:
        seconds = self.flops / self.flops_rate
        seconds = max(seconds, gpu.bytes_seconds(self.other_bytes))
        for name, rows in self.kernels.items():
            kernel = kernels[name]
            assert kernel.count is not None
            tiles = rows * math.ceil(VOCAB / (256 * kernel.width))
            fullest = math.ceil(tiles / gpu.multiprocessors)
            limits = [gpu.bytes_seconds(tiles * kernel.moved)]
            seconds += max([*limits, *gpu.limits(kernel.count, fullest).values()])
        return seconds * 1e6 + self.chain

    def target(self) -> str:
        for case in GPU_CASES:
            if (case.workload, case.sizes, case.dtype) == (self.workload, self.sizes, "bfloat16"):
                if case.target_us:
                    return f"{case.target_us:g} us"
                if case.bandwidth_target:
                    return f"{case.bandwidth_target:.0%} of copy bandwidth"
        return ""


def targets() -> list[Target]:
    top1 = "top1_rows_kernel<BFloat16, Top1ConfidenceFinish, {}>"
    spd = "spd_step_kernel<BFloat16, 1, {}>"
    edit = "edit_step_kernel<BFloat16>"
    forward, backward = "oput_loss_kernel<BFloat16, false>", "oput_loss_backward_kernel<BFloat16>"
    in_place = "loss_and_grad_cluster_kernel<BFloat16, false>"
    sample = "sample_rows_kernel<BFloat16, SampleTokensFinish, true>"
    few, many = "true", "false"  # with a cluster per row, without
    product = 2.0 * DIM * VOCAB  # FLOPs a row
    weight = 2.0 * DIM * VOCAB  # bytes
    return [
        Target("top1_confidence", (32, VOCAB), {top1.format(few): 32}, LAUNCH + LATENCY + BARRIER,
               "the launch, and the first load"),
        Target("top1_confidence", (4096, VOCAB), {top1.format(many): 4096}, LAUNCH, "the bytes"),
        Target("prefix_promote", (16, 32), {}, LAUNCH + LATENCY, "the launch"),
        Target("hybrid_embedding", (32,), {}, LAUNCH + 2 * LATENCY,
               "the launch; the token's id is loaded before its row"),
        Target("spd_step_", (1, 32), {spd.format(few): 32},
               LAUNCH + 2 * LATENCY + BARRIER + ARRIVAL,
               "the launch, and the arrival of a block's positions"),
        Target("spd_step_", (16, 32), {spd.format(many): 512},
               LAUNCH + 2 * LATENCY + 2 * ARRIVAL,
               "the bytes, then the last rows' two arrivals"),
        Target("edit_step_", (1, 32), {edit: 32}, LAUNCH + 2 * LATENCY + 2 * ARRIVAL,
               "two arrivals"),
        Target("sample_tokens", (32, VOCAB), {sample: 32}, LAUNCH + 2 * LATENCY + BARRIER,
               "the launch, the first load, and the drawn tile's second"),
        Target("oput_loss", (4096, VOCAB), {forward: 8192, backward: 8192}, 2 * LAUNCH,
               "the bytes: the logits are read twice and the gradients written once"),
        Target("oput_loss_and_grad_", (4096, VOCAB), {in_place: 8192}, LAUNCH,
               "the bytes; a cluster's barrier is hidden only by the other blocks of its "
               "multiprocessors"),
        Target("linear_top1_confidence", (32, DIM, VOCAB), {}, 2 * LAUNCH,
               "the bytes of the weight", 32 * product, other_bytes=weight),
        Target("linear_oput_loss", (4096, DIM, VOCAB), {}, 0.0,
               "the three matrix products of a summed or averaged loss", 3 * 8192 * product),
    ]  # fmt: skip


def target_rows(kernels: Iterable[Kernel]) -> list[dict[str, Any]]:
    by_name = {kernel.name: kernel for kernel in kernels}
    rows = []
    for target in targets():
        shape = " x ".join(map(str, target.sizes))
        row: dict[str, Any] = {"case": f"{target.workload} {shape}", "target": target.target()}
        for gpu in GPUS:
            row[f"{gpu.name} us"] = round(target.predicted_us(gpu, by_name), 1)
        row["measured, H100 us"] = measured_us(row["case"])
        rows.append(row | {"in the way": target.in_the_way})
    return rows


def measured_us(case: str) -> float | str:
    """The time in the kept record of an H100, if it has the case."""
    for row in json.loads(MEASURED.read_text())["results"]:
        if "candidates" in row and row["case"].startswith((f"{case} bfloat16", f"{case} x")):
            return row["candidates"]["fused"]["us"]
    return ""


def kernel_rows(kernels: Iterable[Kernel]) -> list[dict[str, Any]]:
    rows = []
    for kernel in kernels:
        row: dict[str, Any] = {
            "kernel": kernel.name,
            "registers": kernel.registers,
            "shared": kernel.shared_bytes,
            "blocks": kernel.resident(),
        }
        if kernel.count:
            per_vector = (kernel.count.instructions, kernel.count.mufu, kernel.count.alu)
            for name, count in zip(("instructions", "MUFU", "ALU"), per_vector, strict=True):
                row[name] = round(count / sass.VECTORS, 1)
            for gpu in GPUS:
                share, part = kernel.busiest(gpu)
                row[gpu.name] = f"{part} {share:.0%}"
        rows.append(row)
    return rows


def counts_of(kernels: Iterable[Kernel]) -> dict[str, int]:
    """Instructions per tile, which the tests hold to bench/kernel_counts.json."""
    return {each.name: each.count.instructions for each in kernels if each.count}


def markdown(rows: list[dict[str, Any]]) -> list[str]:
    heads = list(dict.fromkeys(head for row in rows for head in row))
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return lines + [
        "| " + " | ".join(str(row.get(head, "")) for head in heads) + " |" for row in rows
    ]


def page(kernels: list[Kernel], compiler: str) -> str:
    gpus = "; ".join(
        f"{gpu.name}: {gpu.multiprocessors} multiprocessors at {gpu.hertz / 1e9:g} GHz, "
        f"{gpu.bandwidth / 1e12:g} TB/s"
        for gpu in GPUS
    )
    lines = [
        "# Predicted from instruction counts, and measured",
        "",
        "`python bench/kernels.py --keep` writes this page from the machine code that "
        f"{compiler} makes for {ARCHITECTURE}.",
        "",
        f"A time is the slowest of bytes, issue, special functions (MUFU) and ALU on {gpus}; plus "
        f"{LAUNCH:g} us a launch, {LATENCY:g} us for each load from memory that the next step "
        f"waits for, {ARRIVAL:g} us where a row's last block waits for the others, and "
        f"{BARRIER:g} us for a cluster's barrier. The bandwidths and latencies are assumptions. "
        "Targets are those of an H200. The measured times are those of "
        "[gpu-h100.json](gpu-h100.json).",
        "",
        *markdown(target_rows(kernels)),
        "",
        "## Kernels",
        "",
        "Instructions, MUFU and ALU are per lane and 16 bytes of logits read; blocks are those "
        "that share a multiprocessor. The last columns have the busiest part of a multiprocessor, "
        "with its time as a share of the bytes' time: below 100% the bytes bound the kernel at "
        "many rows.",
        "",
        *markdown([row for row in kernel_rows(kernels) if "MUFU" in row]),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the tables here")
    parser.add_argument("--keep", action="store_true", help="renew the committed counts and page")
    options = parser.parse_args()
    if not LIBRARY.exists():
        sys.exit(f"bench/kernels.py: {LIBRARY.relative_to(ROOT)} is not there; `make build` it")
    kernels, compiler = kernels_of()
    rows, goals = kernel_rows(kernels), target_rows(kernels)
    for table in (rows, goals):
        print(*markdown(table), sep="\n")
        print()
    if options.json:
        found = {"compiler": compiler, "architecture": ARCHITECTURE, "measured": False}
        options.json.write_text(json.dumps(found | {"kernels": rows, "targets": goals}, indent=1))
    if options.keep:
        kept = {"compiler": compiler, "architecture": ARCHITECTURE, "counts": counts_of(kernels)}
        COUNTS.write_text(json.dumps(kept, indent=1) + "\n")
        PREDICTED.write_text(page(kernels, compiler))


if __name__ == "__main__":
    main()
