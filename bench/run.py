"""``python bench/run.py`` (``make bench``): every case's candidates in turn, in one run.

Prints a table; with --output writes JSON with the machine, and pictures beside it. Times are
printed but not to be quoted: compare candidates within a run, never runs.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.cases import SERIES, Case, cases_of  # noqa: E402
from bench.machine import machine_facts  # noqa: E402
from bench.peers import add_peers  # noqa: E402
from dmax_kernels.bench.timer import Machine, measure  # noqa: E402


def run_cases(cases: list[Case], machine: Machine, repetitions: int) -> list[dict]:
    rows = []
    for case in tqdm(cases, desc="cases", disable=None):
        work = case.work(machine.device)
        absent = add_peers(work, case.workload, case.inputs(machine.device), case.all_sizes)
        result = measure(work, machine, repetitions=repetitions, compiled=case.compiled)
        targets = {
            "speed-up": case.speedup_target,
            "share of bandwidth": case.bandwidth_target,
            "us": case.target_us,
        }
        row = {"case": case.name, "op": case.workload, **result}
        row["targets"] = {name: value for name, value in targets.items() if value is not None}
        if absent:
            row["peers without a time"] = absent
        if case.predicted_us is not None:
            row["predicted us"] = case.predicted_us
        rows.append(row)
        if machine.device == "cuda":
            torch.cuda.empty_cache()
    return rows


def run_series(machine: Machine, repetitions: int = 7) -> list[dict]:
    """How cost grows: time against rows and against the vocabulary, ours and eager's."""
    series = []
    for name, axis, values, sizes_of in tqdm(SERIES, desc="scaling", disable=None):
        points = []
        for value in values:
            work = Case(name, sizes_of(value)).work(machine.device)
            found = measure(work, machine, repetitions=repetitions)["candidates"]
            points.append({axis: value} | {each: row["us"] for each, row in found.items()})
        series.append({"op": name, "axis": axis, "points": points})
    return series


def print_table(rows: list[dict]) -> None:
    width = max(len(row["case"]) for row in rows)
    print(f"{'case':<{width}}  speed-up  torch.compile  of bandwidth  targets")
    for row in rows:
        candidates = row["candidates"]
        compiled = candidates.get("torch.compile", {}).get("speed-up", "")
        share = f"{row['share of bandwidth']:.0%}" if row["bytes"] else ""
        targets = ", ".join(f"{name} {value}" for name, value in row["targets"].items())
        print(
            f"{row['case']:<{width}}  {candidates['fused']['speed-up']:>8}  {compiled:>13}  "
            f"{share:>12}  {targets}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ops", nargs="*", help="only these ops (default: all, and how cost grows)")
    parser.add_argument("--repetitions", type=int, default=20, help="rounds per case (default 20)")
    parser.add_argument("--threads", type=int, help="CPU threads, for all candidates alike")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--output", type=Path, help="write JSON here, pictures beside it")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    machine = Machine(options.device)
    rows = run_cases(cases_of(options.ops, options.device), machine, options.repetitions)
    print_table(rows)
    record = {"machine": machine_facts(), "results": rows}
    if not options.ops:
        record["scaling"] = run_series(machine)
    if options.output:
        from bench.pictures import draw

        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(record, indent=1) + "\n")
        for path in (options.output, *draw(record, options.output.with_suffix(""))):
            print(f"wrote {path}")


if __name__ == "__main__":
    main()
