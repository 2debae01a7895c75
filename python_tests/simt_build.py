"""Builds and loads the module that runs csrc/cuda/*.cuh on the CPU (csrc/simt), on demand.

``load()`` gives the plain build in this process. ``run_sanitized()`` runs a script of this folder
in a Python of its own with a sanitizer's library preloaded, since a sanitizer must be there first.
"""

import fcntl
import functools
import hashlib
import importlib.util
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
CACHE = Path(os.environ.get("DMAX_SIMT_CACHE", ROOT / "build" / "simt"))

# -ffp-contract=off: every variant computes the same bits
COMMON = ["-std=c++17", "-fPIC", "-fno-extern-tls-init", "-ffp-contract=off", "-fvisibility=hidden"]
WARNINGS = ["-Wall", "-Wextra", "-Wno-unknown-pragmas"]
VARIANTS = {
    "plain": ["-O2", "-g1"],
    "asan": ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all",
             "-fno-sanitize=vptr"],
    "tsan": ["-O1", "-g1", "-fsanitize=thread"],
}  # fmt: skip
PRELOAD = {"asan": "libasan.so", "tsan": "libtsan.so"}
SANITIZER_OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:detect_odr_violation=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1:report_signal_unsafe=0",
}


def compiler() -> str:
    return os.environ.get("CXX", "g++")


def build(variant: str = "plain") -> Path:
    """Path of the module, rebuilt if csrc/cuda or csrc/simt changed since the last time."""
    units = sorted((CSRC / "simt").glob("*.cpp"))
    folders = [CSRC / name for name in ("common", "cuda", "simt")]
    headers = sorted(p for f in folders for p in f.iterdir() if p.suffix in (".h", ".cuh"))
    flags = COMMON + WARNINGS + VARIANTS[variant]
    digest = hashlib.sha256(repr((flags, compiler(), sys.version)).encode())
    for path in [*units, *headers]:
        digest.update(path.name.encode() + path.read_bytes())
    folder = CACHE / f"{variant}-{digest.hexdigest()[:16]}"
    module = folder / "dmax_simt.so"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the other test processes wait instead of building it too
        if not module.exists():
            compile_module(units, flags, module)
    return module


def compile_module(units: list[Path], flags: list[str], module: Path) -> None:
    import sysconfig

    import pybind11

    launcher = shlex.split(os.environ.get("CMAKE_CXX_COMPILER_LAUNCHER", ""))  # such as ccache
    includes = [f"-I{CSRC}", f"-isystem{pybind11.get_include()}",
                f"-isystem{sysconfig.get_paths()['include']}"]  # fmt: skip

    def compile_unit(unit: Path) -> Path:
        target = module.with_name(f"{unit.stem}.o")
        # The executor switches stacks and models the fences itself, and pybind11 is not under test
        plain = unit.stem in ("executor", "collectives", "fiber", "module")
        own = COMMON + WARNINGS + VARIANTS["plain"] if plain else flags
        run_checked([*launcher, compiler(), *own, *includes, "-c", str(unit), "-o", str(target)])
        return target

    with ThreadPoolExecutor(max_workers=2) as pool:
        objects = list(pool.map(compile_unit, units))
    unfinished = module.with_suffix(".part")
    run_checked(
        [compiler(), *flags, "-shared", *map(str, objects), "-o", str(unfinished), "-pthread"]
    )
    for each in objects:
        each.unlink()
    unfinished.replace(module)


def run_checked(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def load_from(path: Path):
    spec = importlib.util.spec_from_file_location("dmax_simt", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def load():
    return load_from(build("plain"))


def run_sanitized(variant: str, script: str, *arguments: str, timeout: float = 600):
    """Runs python_tests/<script> under the variant's sanitizer; the module's path comes first."""
    library = subprocess.run(
        [compiler(), f"-print-file-name={PRELOAD[variant]}"], capture_output=True, text=True
    ).stdout.strip()
    environment = {
        **os.environ, **SANITIZER_OPTIONS, "LD_PRELOAD": library, "PYTHONMALLOC": "malloc",
        "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, str(ROOT / "python_tests" / script), str(build(variant)), *arguments]
    if variant == "tsan":  # its shadow memory has no room for a randomised layout
        command = ["setarch", "-R", *command]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout)
