"""``make gpu``: build for this machine's GPU, test, sanitize, measure; one JSON with the figures.

Nothing is downloaded: the PyTorch, nvcc, CMake, ninja and pytest of this machine are used. The JSON
goes to ``$OUT`` where that is set, else to ``bench/results/``. Stages run in this order, and the
first that fails ends the session with its exit code, after the JSON of what was done.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.machine import commit  # noqa: E402

BUILD = ROOT / "build" / "gpu"
STAGES = ("build", "test", "sanitize", "bench")
SANITIZERS = ("memcheck", "racecheck")
# compute-sanitizer's own message where a machine does not let it attach
NOT_SUPPORTED = ("Device not supported", "not supported on this device", "Unable to initialize")


def command(arguments: list[str], **options) -> subprocess.CompletedProcess:
    print("$", " ".join(map(str, arguments)), flush=True)
    return subprocess.run(arguments, cwd=ROOT, check=False, text=True, **options)


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
    for tool in ("nvcc", "cmake", "ninja"):
        if shutil.which(tool) is None and not Path("/usr/local/cuda/bin", tool).exists():
            return f"{tool} is not installed"
    driver = command(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True
    )
    return {
        "device": torch.cuda.get_device_name(),
        "compute capability": f"{major}.{minor}",
        "multiprocessors": torch.cuda.get_device_properties(0).multi_processor_count,
        "driver": driver.stdout.strip().splitlines()[0] if driver.returncode == 0 else "unknown",
        "torch": torch.__version__,
        "CUDA of torch": torch.version.cuda,
        "python": sys.version.split()[0],
    }


def build(capability: str) -> int:
    architecture = capability.replace(".", "")
    architecture = "90a" if architecture == "90" else architecture
    configure = ["cmake", "-S", ".", "-B", str(BUILD), "-G", "Ninja",
                 f"-DPython_EXECUTABLE={sys.executable}",
                 f"-DDMAX_CUDA_ARCHITECTURES={architecture}"]  # fmt: skip
    for step in (
        configure,
        ["cmake", "--build", str(BUILD)],
        ["cmake", "--install", str(BUILD), "--prefix", str(ROOT)],
    ):
        if code := command(step).returncode:
            return code
    return 0


def test() -> int:
    return command(
        [sys.executable, "-m", "pytest", "-m", "gpu", "python_tests", "-q", "--tb=short"]
    ).returncode


def sanitize(record: dict) -> int:
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        record["sanitize"] = "compute-sanitizer is not installed"
        return 0
    record["sanitize"] = {}
    for name in SANITIZERS:
        done = command(
            [tool, "--tool", name, "--error-exitcode", "9", sys.executable,
             "bench/gpu_small_cases.py"], capture_output=True,
        )  # fmt: skip
        output = done.stdout + done.stderr
        print(output[-2000:])
        if any(text in output for text in NOT_SUPPORTED):
            record["sanitize"][name] = "refused by this machine"
            continue
        record["sanitize"][name] = "clean" if done.returncode == 0 else output[-4000:]
        if done.returncode:
            return done.returncode
    return 0


def bench(record: dict) -> int:
    """The GPU cases of every op, and how cost grows; pictures where matplotlib is installed."""
    import torch

    from bench.linear_ways import run_linear_ways
    from bench.machine import machine_facts
    from bench.run import cases_of, print_table, run_cases, run_series
    from dmax_kernels.bench.timer import Machine

    machine = Machine("cuda")
    record["machine"] = machine_facts() | record["machine"]
    record["copy GB/s"] = round(machine.copy_bandwidth / 1e9, 1)
    record["matrix TFLOP/s"] = round(machine.matrix_rate(torch.bfloat16) / 1e12, 1)
    record["results"] = run_cases(cases_of(device="cuda"), machine, repetitions=100)
    print_table(record["results"])
    record["scaling"] = run_series(machine)
    record["linear ways"] = run_linear_ways()
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stages", nargs="*", help=f"some of {', '.join(STAGES)} (default: all)")
    options = parser.parse_args()
    stages = options.stages or STAGES
    if unknown := set(stages) - set(STAGES):
        parser.error(f"no stage {', '.join(sorted(unknown))}; there are: {', '.join(STAGES)}")
    facts = gpu_facts()
    if isinstance(facts, str):
        print(f"make gpu: {facts}", file=sys.stderr)
        return 1
    record = {"machine": facts | {"commit": commit(), "date": datetime.date.today().isoformat()}}
    code = 0
    for stage in stages:
        begin = time.perf_counter()
        if stage == "build":
            code = build(facts["compute capability"])
        elif stage == "test":
            code = test()
        elif stage == "sanitize":
            code = sanitize(record)
        else:
            code = bench(record)
        seconds = round(time.perf_counter() - begin, 1)
        record.setdefault("stages", {})[stage] = {"exit code": code, "seconds": seconds}
        if code:
            break
    folder = Path(os.environ.get("OUT") or ROOT / "bench" / "results")
    folder.mkdir(parents=True, exist_ok=True)
    name = facts["device"].lower().replace(" ", "-")
    path = folder / f"gpu-{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    if "results" in record and importlib.util.find_spec("matplotlib"):
        from bench.pictures import draw

        print(*draw(record, path.with_suffix("")), sep="\n")
    print(f"make gpu: {'failed at ' + stage if code else 'done'}; {path}")
    return code


if __name__ == "__main__":
    sys.exit(main())
