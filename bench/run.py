"""``python bench/run.py``: every case's candidates in turn; a table, and JSON with the machine.

Times are printed but not to be quoted: compare candidates within a run, never runs.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.cases import Case  # noqa: E402
from dmax_kernels.cli.info import collect  # noqa: E402
from dmax_kernels.testing.timer import compare, read_seconds  # noqa: E402


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return "unknown CPU"


def commit() -> str:
    run = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return run.stdout.strip() or "not a checkout"


def measure(case: Case, repetitions: int) -> dict:
    work = case.build()
    timings = compare(work.candidates, repetitions=repetitions, before_each=work.before_each)
    base = timings[case.candidates[0]].median
    row = {
        "case": case.name,
        "microseconds": {name: round(t.median * 1e6, 1) for name, t in timings.items()},
        "spread": {name: round(t.spread, 3) for name, t in timings.items()},
        "speed-up": {
            name: round(base / t.median, 2)
            for name, t in timings.items()
            if name != case.candidates[0]
        },
        "target": case.target,
    }
    if work.read is not None:
        read = read_seconds(work.read)
        row["share of read bandwidth"] = round(read / timings["fused"].median, 3)
        row["bandwidth target"] = case.bandwidth_target
        row["read GB/s"] = round(work.read.nbytes / read / 1e9, 1)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ops", nargs="*", help="only these ops (default: all)")
    parser.add_argument("--repetitions", type=int, default=20, help="rounds per case (default 20)")
    parser.add_argument("--threads", type=int, help="CPU threads, for all candidates alike")
    parser.add_argument("--output", type=Path, help="write the results as JSON here")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)

    files = sorted((ROOT / "bench").glob("bench_*.py"))
    known = {path.stem.removeprefix("bench_"): f"bench.{path.stem}" for path in files}
    unknown = set(options.ops) - set(known)
    if unknown:
        sys.exit(
            f"bench: no benchmark of {', '.join(sorted(unknown))}; there are: {', '.join(known)}"
        )
    cases = [
        case
        for op, module in known.items()
        if not options.ops or op in options.ops
        for case in importlib.import_module(module).CASES
    ]

    rows = []
    for case in tqdm(cases, desc="cases", disable=None):
        rows.append(measure(case, options.repetitions))
    width = max(len(row["case"]) for row in rows)
    print(f"{'case':<{width}}  speed-up  target  of read bandwidth  target")
    for row in rows:
        share = row.get("share of read bandwidth", "")
        print(
            f"{row['case']:<{width}}  {row['speed-up']['fused']:>8}  {row['target'] or '':>6}  "
            f"{share:>17}  {row.get('bandwidth target') or '':>6}"
        )
    if options.output:
        facts = collect()
        machine = {"CPU": cpu_name(), "cores": os.cpu_count(), "commit": commit()}
        machine["date"] = datetime.date.today().isoformat()
        machine |= {k: v for k, v in facts.items() if k not in ("backends", "CPU library")}
        options.output.write_text(
            json.dumps({"machine": machine, "results": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
