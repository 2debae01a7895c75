"""What a result must carry to mean anything: the machine, the versions, the commit, the date."""

from __future__ import annotations

import datetime
import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def machine_facts() -> dict:
    from dmax_kernels.cli.info import collect  # it imports torch; `commit` must not

    facts = {"CPU": cpu_name(), "cores": os.cpu_count(), "commit": commit()}
    facts["date"] = datetime.date.today().isoformat()
    return facts | {
        name: fact
        for name, fact in collect().items()
        if name not in ("backends", "CPU library", "CUDA library", "CUDA kernels")
    }


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return "unknown CPU"


def commit() -> str:
    run = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return run.stdout.strip() or "not a checkout"
