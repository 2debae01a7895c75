"""``python bench/run.py`` (``make bench``): every case's candidates in turn, in one run.

Prints each cell beside eager PyTorch and beside the best peer, the cells that lose to one, and the
geometric mean; with --output writes JSON after every case, and pictures at the end. Times are
printed but not to be quoted: compare candidates within a run, never runs. After --seconds the run
ends and says which cells it left out.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.cases import SERIES, Case, cases_of, is_quick, key_cases  # noqa: E402
from bench.cpu_peers import add_cpu_peers  # noqa: E402
from bench.fake_gpu import FakeGpu, small  # noqa: E402
from bench.linear_ways import WORKLOADS as LINEAR_WAYS  # noqa: E402
from bench.linear_ways import add_linear_ways, least_chunked_rows  # noqa: E402
from bench.machine import machine_facts  # noqa: E402
from bench.peers import add_peers  # noqa: E402
from dmax_kernels.bench.timer import COMPILE_MODES, Machine, measure  # noqa: E402
from dmax_kernels.bench.workload import Work  # noqa: E402
from dmax_kernels.files import check_output, save_json  # noqa: E402

# After such an error this process can no longer use the GPU, but a new one can
LOST_CONTEXT_CODE = 75  # this program's exit code then
LOST_CONTEXT = ("CUDA error", "device-side assert", "CUBLAS_STATUS")
LOST_WITH_PEERS = "not tried: with them the GPU was lost"


class Budget:
    """The seconds left, shared out evenly among the cases still to come."""

    def __init__(self, seconds: float) -> None:
        self.end = time.perf_counter() + seconds

    def left(self) -> float:
        return self.end - time.perf_counter()

    def share(self, cases: int) -> float:
        """Half a case's share: warm-up and compilation take about as long again."""
        return min(10.0, max(0.3, self.left() / max(cases, 1) / 2))


def measure_case(
    case: Case,
    machine: Machine,
    repetitions: int,
    compiled: Sequence[str],
    at_most_seconds: float,
    with_peers: bool = True,
) -> dict:
    absent: dict[str, str] | None = None  # until the peers have been tried

    def make() -> Work:
        nonlocal absent
        work = case.work(machine.device)
        if machine.gpu is None:
            add_cpu_peers(work, case.workload, compiled=bool(compiled))
            return work
        if with_peers:
            absent = add_peers(work, case.workload, absent)
        if case.workload in LINEAR_WAYS and machine.device == "cuda":
            add_linear_ways(work, case.workload)
        return work

    result = measure(
        make, machine, repetitions=repetitions,
        compiled=compiled if case.compiled else (), at_most_seconds=at_most_seconds,
    )  # fmt: skip
    targets = {
        "speed-up": case.speedup_target,
        "share of bandwidth": case.bandwidth_target,
        "us": case.target_us,
    }
    row = {"case": case.name, "op": case.workload, "sizes": case.all_sizes, **result}
    row["targets"] = {name: value for name, value in targets.items() if value is not None}
    if absent:
        row["without a time"] = absent | row.get("without a time", {})
    if case.predicted_us is not None:
        row["predicted us"] = case.predicted_us
    return row


def run_cases(
    cases: Sequence[Case],
    machine: Machine,
    *,
    repetitions: int = 20,
    budget: Budget | None = None,
    compiled: Sequence[str] = tuple(COMPILE_MODES),
    threads: Sequence[int] = (),
    without_peers: Collection[str] = (),
    save: Callable[[list[dict], list[str]], object] = lambda rows, left_out: None,
) -> list[dict]:
    """A row for each case and number of CPU threads; `save` gets them after each. `without_peers`
    names cases that run without them.

    A case that fails gets a row that says so, and ends the run only if the GPU is lost too.
    """
    budget = budget or Budget(math.inf)
    before = torch.get_num_threads()
    cells = [(case, count) for count in threads or (before,) for case in cases]
    rows: list[dict] = []
    try:
        for index, (case, count) in enumerate(tqdm(cells, desc="cases", disable=None)):
            if budget.left() <= 0:
                break
            torch.set_num_threads(count)
            seconds = budget.share(len(cells) - index)
            with_peers = case.name not in without_peers
            try:
                row = measure_case(case, machine, repetitions, compiled, seconds, with_peers)
            except Exception as error:
                text = f"{type(error).__name__}: {error}".splitlines()[0]
                row = {"case": case.name, "op": case.workload, "failed": text}
                print(f"{case.name}: {text}", file=sys.stderr)
            if not with_peers:
                row["peers"] = LOST_WITH_PEERS
            if machine.gpu is None:
                row["threads"] = count
            rows.append(row)
            save(rows, [f"{case.name}, {count} threads" for case, count in cells[index + 1 :]])
            if lost_context(row):
                break
    finally:
        torch.set_num_threads(before)
    return rows


def lost_context(row: dict) -> bool:
    return any(text in row.get("failed", "") for text in LOST_CONTEXT)


def run_series(
    machine: Machine,
    *,
    repetitions: int = 7,
    budget: Budget | None = None,
    shrink: Callable[[Case], Case] = lambda case: case,
) -> list[dict]:
    """How cost grows: time against rows and against the vocabulary, ours and eager's."""
    budget = budget or Budget(math.inf)
    series = []
    for name, axis, values, sizes_of in tqdm(SERIES, desc="scaling", disable=None):
        points = []
        for value in values:
            if budget.left() <= 0:
                return series
            case = shrink(Case(name, sizes_of(value)))
            found = measure(
                lambda case=case: case.work(machine.device), machine,
                repetitions=repetitions, at_most_seconds=1.0,
            )["candidates"]  # fmt: skip
            points.append({axis: value} | {each: row["us"] for each, row in found.items()})
        series.append({"op": name, "axis": axis, "points": points})
    return series


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def print_table(rows: list[dict]) -> None:
    """Every cell, then those that lose to a peer, then the mean."""
    if not rows:
        return
    width = max(len(row["case"]) for row in rows)
    print(f"{'case':<{width}}  threads  of eager  of best peer (least)  of bandwidth  best peer")
    for row in rows:
        if "failed" in row:
            print(f"{row['case']:<{width}}  failed: {row['failed']}")
            continue
        share = f"{row['share of bandwidth']:.0%}" if row["bytes"] else ""
        least = f"({row.get('to best peer, least times', '')})"
        print(
            f"{row['case']:<{width}}  {row.get('threads', ''):>7}  "
            f"{row['candidates']['fused'].get('speed-up', ''):>8}  "
            f"{row.get('to best peer', ''):>12} {least:>7}  {share:>12}  {row.get('best peer', '')}"
        )
    compared = [row for row in rows if row.get("to best peer")]
    if not compared:
        return
    lost = [row for row in compared if row["to best peer"] < 1]
    print(f"\n{len(lost)} of {len(compared)} cells are below 1.0 times the best peer:")
    for row in sorted(lost, key=lambda row: row["to best peer"]):
        threads = f", {row['threads']} threads" if "threads" in row else ""
        print(f"  {row['to best peer']:>5}  {row['case']}{threads}: {row['best peer']}")
    mean = geometric_mean([row["to best peer"] for row in compared])
    print(f"geometric mean over the best peer: {mean:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ops", nargs="*", help="only these ops (default: all, and how cost grows)")
    parser.add_argument("--repetitions", type=int, default=20, help="rounds per case (default 20)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: 2, then 1)")
    parser.add_argument("--seconds", type=float, default=720, help="of the cases (default 720)")
    parser.add_argument(
        "--quick", action="store_true", help="one shape an op, without torch.compile: a minute"
    )
    parser.add_argument(
        "--without-compile",
        action="store_true",
        help="no candidate of torch.compile: half the time",
    )
    parser.add_argument("--key", action="store_true", help="the ten GPU cases that matter most")
    parser.add_argument(
        "--append", action="store_true", help="leave out what --output has of this commit already"
    )
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda", "fake"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="fake: walk the GPU's path on a CPU, with small sizes",
    )
    parser.add_argument("--output", type=Path, help="write JSON here, pictures beside it")
    options = parser.parse_args()
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        check_output("--output", options.output)
    sys.exit(run(options))


def run(options: argparse.Namespace) -> int:
    fake, on_cpu = options.device == "fake", options.device == "cpu"
    machine = Machine("cpu", gpu=FakeGpu()) if fake else Machine(options.device)
    cases = key_cases() if options.key else cases_of(options.ops, "cpu" if on_cpu else "cuda")
    if fake:
        cases = list({case.name: case for case in map(small, cases)}.values())
    if options.quick:
        cases = [case for case in cases if is_quick(case)]
    threads = [options.threads or 2] if options.threads or options.quick else [2, 1]
    record: dict = {"machine": machine_facts(), "results": []}
    retried: set[str] = set()  # without the peers, one of which may have been the cause
    if options.append:
        before = earlier_record(options.output, record["machine"])
        found = before.get("results", [])
        record = before | record  # with what else it holds, how cost grows for one
        retried = {row["case"] for row in found if lost_context(row) and "peers" not in row}
        record["results"] = [row for row in found if row["case"] not in retried]
        names = {row["case"] for row in record["results"]}
        cases = [case for case in cases if case.name not in names]
    earlier, budget = record["results"], Budget(options.seconds)
    compiled = tuple(COMPILE_MODES)[: 1 if options.key else 2]
    if options.quick or options.without_compile or fake:
        compiled = ()
    if not on_cpu:
        record |= {
            "read GB/s": round(machine.read_bandwidth / 1e9, 1),
            "copy GB/s": round(machine.copy_bandwidth / 1e9, 1),
            "matrix TFLOP/s": round(machine.matrix_rate(torch.bfloat16) / 1e12, 1),
        }

    def save(rows: list[dict], left_out: list[str]) -> None:
        record.update({"results": earlier + rows, "left out": left_out})
        if options.output:
            save_json(options.output, record)

    rows = run_cases(
        cases, machine, repetitions=options.repetitions, budget=budget,
        compiled=compiled, threads=threads if on_cpu else (), without_peers=retried, save=save,
    )  # fmt: skip
    print_table(rows)
    left_out = record.get("left out", [])
    for name in left_out:
        print(f"left out, since --seconds were over: {name}")
    if rows and lost_context(rows[-1]):
        return LOST_CONTEXT_CODE
    if not (options.ops or options.quick or options.key):
        record["scaling"] = run_series(
            machine, budget=None if on_cpu else budget, **({"shrink": small} if fake else {})
        )
        if on_cpu:
            from bench.loops import busy_core, loop_shares

            record["a core taken"], record["loops"] = busy_core(), loop_shares()
            print(json.dumps([record["a core taken"], record["loops"]], indent=1))
    if machine.device == "cuda" and not options.key:
        for workload in LINEAR_WAYS:
            for dtype in ("bfloat16", "float32"):
                least = least_chunked_rows(record["results"], workload, dtype)
                print(f"{workload} of {dtype} should take chunks from {least} rows on")
    if options.output:
        save(rows, left_out)
        print(f"wrote {options.output}")
    if options.output and on_cpu:  # bench/report.py draws those of a GPU's record, elsewhere
        from bench.pictures import draw

        for path in draw(record, options.output.with_suffix("")):
            print(f"wrote {path}")
    return 0


def earlier_record(path: Path, machine: dict) -> dict:
    """An earlier record, if it has the same commit and machine."""
    if not path.exists():
        return {}
    record = json.loads(path.read_text())
    same = all(record["machine"].get(key) == machine[key] for key in ("commit", "GPU", "CPU"))
    return record if same else {}


if __name__ == "__main__":
    main()
