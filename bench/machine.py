"""What a result must carry to mean anything: the machine, the versions, the commit, the date."""

from __future__ import annotations

import datetime
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def machine_facts() -> dict:
    from dmax_kernels.cli.info import collect  # these import torch; `commit` must not
    from dmax_kernels.models.machine import cpu_name

    facts = {"CPU": cpu_name(), "cores": os.cpu_count(), "commit": commit()}
    facts["date"] = datetime.date.today().isoformat()
    if driver := driver_version():
        facts["driver"] = driver
    return facts | {
        name: fact
        for name, fact in collect().items()
        if name not in ("backends", "CPU library", "CUDA library", "CUDA kernels")
    }


def driver_version() -> str:
    """NVIDIA's, or nothing where there is none."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ""
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip().split("\n")[0] if done.returncode == 0 else ""


def gpu_facts() -> dict | str:
    """The GPU, or one line that says why there is none to use."""
    try:
        import torch
    except ImportError:
        return "PyTorch is not installed for this Python"
    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} was built without CUDA"
    if not torch.cuda.is_available():
        return "no NVIDIA GPU (or no driver) is visible to PyTorch"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return (
            f"{torch.cuda.get_device_name()} has compute capability {major}.{minor}, 8.0 is needed"
        )
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": torch.cuda.get_device_name(),
        "compute capability": f"{major}.{minor}",
        "multiprocessors": properties.multi_processor_count,
        "L2 bytes": properties.L2_cache_size,
        "torch": torch.__version__,
        "CUDA of torch": torch.version.cuda,
        "python": sys.version.split()[0],
    }


def commit() -> str:
    """The checkout's, or $DMAX_COMMIT where the tree was carried and its .git was not."""
    if carried := os.environ.get("DMAX_COMMIT"):
        return carried
    run = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return run.stdout.strip() or "not a checkout"
