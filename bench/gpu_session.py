"""``make gpu``: what is run on a machine with a GPU, in stages, the most valuable first.

    build      the libraries for this GPU; left out where dmax_kernels/lib already serves it
    smoke      every op on small inputs against the CPU's results
    tune       rows split among blocks in every way: what csrc/cuda/rows.cuh should choose
    key        the ten cases that matter most, timed
    test       the tests that run on a GPU
    bench      all the other cases
    profile    the kernels of the key cases under ncu
    sanitize   the CUDA kernels under compute-sanitizer

``python bench/gpu_session.py key test --seconds 540`` does those two within nine minutes: the time
left is shared out among the cases, and a command that outlasts it is ended. Nothing is downloaded.
Only a failed build ends the session: any other failure is recorded. Files go
to ``$OUT`` where that is set, else the figures to ``bench/results/`` and the rest to ``build/gpu``;
they are written after every case and every stage, so that a session cut off keeps what it has.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.machine import commit, gpu_facts  # noqa: E402
from bench.session_logs import outcomes, sanitizer_verdict  # noqa: E402
from dmax_kernels._gpus import runs_on  # noqa: E402
from dmax_kernels.files import save_json  # noqa: E402

STAGES = ("build", "smoke", "tune", "key", "test", "bench", "profile", "sanitize")
BUILD = ROOT / "build" / "gpu"
LIBRARIES = ROOT / "dmax_kernels" / "lib"
SANITIZERS = ("memcheck", "racecheck", "synccheck")
LOST_CONTEXT = 75  # bench/run.py's exit code after an error that ends a process's use of the GPU
TIMED_OUT = 124


class Session:
    """One run of some stages: where its files go, how much time is left, what it found."""

    def __init__(
        self, facts: dict[str, Any], *, seconds: float, dry_run: bool, carried: bool,
        without_compile: bool = False,
    ) -> None:  # fmt: skip
        self.facts, self.dry_run, self.carried = facts, dry_run, carried
        self.without_compile = without_compile
        self.device = "cpu" if dry_run else "cuda"
        self.end = time.perf_counter() + seconds
        out = os.environ.get("OUT")
        self.files = Path(out) if out else BUILD
        self.files.mkdir(parents=True, exist_ok=True)
        self.logs: set[str] = set()  # of this session
        figures = self.files if out or dry_run else ROOT / "bench" / "results"
        name = facts["device"].lower().replace(" ", "-")
        self.figures = figures / f"gpu-{name}.json"
        self.record: dict[str, Any] = {"machine": facts | {"commit": commit()}, "stages": {}}
        earlier = self.files / "session.json"
        if earlier.exists():  # stages that earlier sessions ran at the same commit
            found = json.loads(earlier.read_text())
            self.record = found if found["machine"] == self.record["machine"] else self.record

    def left(self) -> float:
        return self.end - time.perf_counter()

    def save(self) -> None:
        save_json(self.files / "session.json", self.record)

    def run(self, log: str, arguments: list, environment: dict[str, str] | None = None) -> int:
        """Runs a command until it ends or the session's time is over (exit code 124). Its output
        goes to the log as it comes."""
        print("$", " ".join(map(str, arguments)), flush=True)
        with (self.files / log).open("ab" if log in self.logs else "wb") as file:
            self.logs.add(log)
            process = subprocess.Popen(
                list(map(str, arguments)), cwd=ROOT, stdout=file, stderr=subprocess.STDOUT,
                env=os.environ | {"PYTHONUNBUFFERED": "1"} | (environment or {}),
                start_new_session=True,
            )  # fmt: skip
            try:
                return process.wait(None if self.left() == math.inf else max(self.left(), 1))
            except subprocess.TimeoutExpired:
                return TIMED_OUT
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def text(self, log: str) -> str:
        return (self.files / log).read_text(errors="replace")

    def tool(self, name: str) -> str | None:
        beside_nvcc = Path("/usr/local/cuda/bin", name)
        return shutil.which(name) or (str(beside_nvcc) if beside_nvcc.exists() else None)

    # ---- stages: each returns an exit code and what it found ----

    def build(self) -> tuple[int, Any]:
        if served := libraries_serve(self.facts["compute capability"], self.carried):
            return 0, f"not built: {served}"
        if missing := [tool for tool in ("nvcc", "cmake", "ninja") if not self.tool(tool)]:
            return 1, f"{missing[0]} is not installed"
        architecture = self.facts["compute capability"].replace(".", "")
        architecture = "90a" if architecture == "90" else architecture
        steps = (
            ["cmake", "-S", ".", "-B", BUILD, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release",
             "-DCMAKE_CUDA_FLAGS=-lineinfo", f"-DPython_EXECUTABLE={sys.executable}",
             f"-DDMAX_CUDA_ARCHITECTURES={architecture}"],
            ["cmake", "--build", BUILD],
            ["cmake", "--install", BUILD, "--prefix", ROOT],
        )  # fmt: skip
        for step in steps:
            if self.dry_run:
                print("would run", " ".join(map(str, step)))
            elif code := self.run("build.log", step):
                return code, self.text("build.log")[-4000:]
        return 0, f"for sm_{architecture}"

    def smoke(self) -> tuple[int, Any]:
        code = self.run("smoke.log", self.calls("check"))
        off = [line for line in self.text("smoke.log").splitlines() if ": " in line]
        off = [line for line in off if not line.endswith((": as on the CPU", ": done"))]
        return code, off or "every op as on the CPU"

    def tune(self) -> tuple[int, Any]:
        """csrc/cuda/rows.cuh: how many blocks take a row, and whether they form a cluster."""
        code = self.run("tune.log", self.calls("splits"))
        lines = [line for line in self.text("tune.log").splitlines() if line.startswith("{")]
        return code, json.loads(lines[-1]) if lines else self.text("tune.log")[-2000:]

    def calls(self, what: str) -> list:
        return [sys.executable, "bench/gpu_calls.py", what, "--device", self.device]

    def key(self) -> tuple[int, Any]:
        return self.bench("--key")

    def bench(self, *options: str) -> tuple[int, Any]:
        """bench/run.py in its own process, restarted where an error cost it the GPU."""
        arguments = [sys.executable, "bench/run.py", "--append", "--output", self.figures, *options]
        arguments += ["--repetitions", "3" if self.dry_run else "100"]
        arguments += ["--without-compile"] * self.without_compile
        arguments += ["--device", "fake" if self.dry_run else "cuda"]
        # In a modified tree, records from before this session may come from different sources
        known = re.fullmatch(r"[0-9a-f]+", self.record["machine"]["commit"])
        if not known and "bench.log" not in self.logs:
            self.figures.unlink(missing_ok=True)
        code = LOST_CONTEXT
        while code == LOST_CONTEXT and self.left() > 0:
            seconds = [] if self.left() == math.inf else ["--seconds", f"{self.left() - 5:.0f}"]
            code = self.run("bench.log", [*arguments, *seconds])
        print(self.text("bench.log")[-6000:])
        found = json.loads(self.figures.read_text()) if self.figures.exists() else {"results": []}
        failed = [row["case"] for row in found["results"] if "failed" in row]
        return code, {"cases": len(found["results"]), "failed": failed}

    def test(self) -> tuple[int, Any]:
        base = [sys.executable, "-m", "pytest", "-o", "addopts=--strict-markers", "-v"]
        base += ["--tb=short", "-p", "no:cacheprovider", "--maxfail", "100"]
        if self.dry_run:
            base += ["--collect-only", "-q"]
        else:
            processes = str(min(12, os.cpu_count() or 1))
            xdist = ["-n", processes, "--dist", "load"]
            base += xdist if importlib.util.find_spec("xdist") else []
            base += ["--timeout", "120"] if importlib.util.find_spec("pytest_timeout") else []
        marked, triton = gpu_tests()
        groups = {"marked": ["-m", "gpu", *marked], "triton": ["-k", "triton or linear", *triton]}
        code, found = 0, {}
        for name, arguments in groups.items():
            log = f"test-{name}.log"
            # Ten random inputs for each op: a failing one is not shrunk (conftest.py)
            ended = self.run(log, [*base, *arguments], {"DMAX_FUZZ_EXAMPLES": "10"})
            code = code or ended
            found[name] = {"exit code": ended, **outcomes(self.text(log))}
        return code, found

    def profile(self) -> tuple[int, Any]:
        prefix = []
        if not self.dry_run:
            tool = self.tool("ncu")
            if tool is None:
                return 0, "ncu is not installed"
            prefix = [tool, "--clock-control", "none", "--kernel-name-base", "mangled",
                      "-k", "regex:dmax|linear_|chunk_|soft_", "--set", "basic"]  # fmt: skip
        return self.run("profile.log", [*prefix, *self.calls("key")]), "profile.log"

    def sanitize(self) -> tuple[int, Any]:
        """Each tool on our kernels alone, or on all where the tool's version has no such filter.

        PyTorch's memory cache is off: with it, an access past a tensor stays inside the same block.
        """
        tool = None if self.dry_run else self.tool("compute-sanitizer")
        if tool is None and not self.dry_run:
            return 0, "compute-sanitizer is not installed"
        found = {}
        for name in SANITIZERS:
            log = f"{name}.log"
            for kernels in (["--kernel-regex", "kns=dmax"], []):
                self.logs.discard(log)
                prefix = [tool, "--tool", name, "--report-api-errors", "no"]
                prefix += ["--error-exitcode", "9"]
                self.run(
                    log,
                    ([*prefix, *kernels] if tool else []) + self.calls("small"),
                    {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
                )
                if "SUMMARY" in self.text(log) or not tool or self.left() <= 0:
                    break
            found[name] = sanitizer_verdict(self.text(log)) if tool else "walked"
        return 0, found


def gpu_tests() -> tuple[list[str], list[str]]:
    """The files with tests that need a GPU, which have the mark or get it from fuzzing; and the
    others, some of whose tests run Triton's kernels on a GPU where there is one."""
    marked, triton = [], []
    for path in sorted(Path(ROOT, "python_tests").glob("test_*.py")):
        text = path.read_text()
        if "pytest.mark.gpu" in text or "from fuzzing import" in text:
            marked.append(f"python_tests/{path.name}")
        elif "from triton_device import" in text:
            triton.append(f"python_tests/{path.name}")
    return marked, triton


def libraries_serve(capability: str, carried: bool) -> str:
    """Why nothing need be built, or nothing: the libraries are there, with code for this GPU, and
    newer than the sources, which `carried` says in place of the dates."""
    report = LIBRARIES / "libdmax_cuda.json"
    needed = [report, LIBRARIES / "libdmax_cuda.so", LIBRARIES / "libdmax_cpu.so"]
    if not all(path.exists() for path in needed):
        return ""
    architectures = json.loads(report.read_text())["architectures"]
    version = tuple(map(int, capability.split(".")))
    if not any(runs_on(each, version) for each in architectures):
        return ""
    newest = max(path.stat().st_mtime for path in (ROOT / "csrc").rglob("*") if path.is_file())
    if not carried and min(path.stat().st_mtime for path in needed) < newest:
        return ""
    return f"dmax_kernels/lib has kernels for sm_{' '.join(architectures)}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stages", nargs="*", help="some of them (default: all), in the order above")
    parser.add_argument("--seconds", type=float, default=math.inf, help="of all stages together")
    parser.add_argument(
        "--carried", action="store_true", help="use dmax_kernels/lib as it is, whatever its date"
    )
    parser.add_argument(
        "--without-compile", action="store_true", help="leave torch.compile out of the benchmarks"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="walk every stage with a stand-in for the GPU"
    )
    options = parser.parse_args()
    if unknown := set(options.stages) - set(STAGES):
        parser.error(f"no stage {', '.join(sorted(unknown))}; there are: {', '.join(STAGES)}")
    if options.dry_run:
        from bench.fake_gpu import FACTS as facts
    else:
        facts = gpu_facts()
    if isinstance(facts, str):
        print(f"make gpu: {facts}", file=sys.stderr)
        return 1
    session = Session(
        facts, seconds=options.seconds, dry_run=options.dry_run, carried=options.carried,
        without_compile=options.without_compile,
    )  # fmt: skip
    failed = []
    for stage in STAGES:
        if options.stages and stage not in options.stages:
            continue
        if session.left() <= 0:
            session.record["stages"][stage] = "not begun: the time was over"
            continue
        begin = time.perf_counter()
        try:
            code, found = getattr(session, stage)()
        except Exception as error:  # our own fault must not cost the next stages
            code, found = 1, f"{type(error).__name__}: {error}"
        seconds = round(time.perf_counter() - begin, 1)
        session.record["stages"][stage] = {"exit code": code, "seconds": seconds, "found": found}
        session.save()
        print(f"{stage}: exit code {code}, {seconds} s: {json.dumps(found, indent=1)}", flush=True)
        failed += [stage] if code else []
        if code and stage == "build":
            break
    session.save()
    print(f"make gpu: {'failed: ' + ', '.join(failed) if failed else 'done'}; {session.files}")
    return min(len(failed), 1)


if __name__ == "__main__":
    sys.exit(main())
