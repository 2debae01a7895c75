"""The sources compile against the headers of the oldest torch that pyproject.toml allows.

The libraries run on any torch from there on, and so does what a user builds; but the headers of a
newer torch have names that the oldest lacks. The headers are the same on every platform: they come
from the wheel for macOS, which is 80 MB; the one for Linux is 900 MB.
"""

import fcntl
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OLDEST = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())[1]
CACHE = ROOT / "build" / f"torch-{OLDEST}-headers"
CSRC = ROOT / "csrc"
# The sources of csrc/cpu/simd know no torch
HOST_SOURCES = [CSRC / "schemas.cpp", *sorted((CSRC / "cpu").glob("*.cpp"))]
# The device guard, and a direct call of the C functions below the stable ABI
CUDA_SOURCES = [CSRC / "cuda" / "host.cu", CSRC / "cuda" / "embedding.cu"]
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


@pytest.fixture(scope="module")
def flags():
    if not shutil.which("g++"):
        pytest.skip("no g++ here")
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one download, however many test processes there are
        if not (CACHE / "torch").is_dir():
            download()
    version = 0x0200000000000000 | int(OLDEST.split(".")[1]) << 48
    return [
        "-std=c++17",
        f"-DTORCH_TARGET_VERSION={version:#x}",
        f"-I{CSRC}",
        "-isystem",
        str(CACHE / "torch" / "include"),
    ]


def download():
    options = ("--no-deps", "--only-binary", ":all:", "--platform", "macosx_11_0_arm64")
    command = [sys.executable, "-m", "pip", "download", "-q", *options, "-d", CACHE]
    done = subprocess.run(
        [*map(str, command), "--python-version", "3.10", f"torch=={OLDEST}.*"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"the headers of torch {OLDEST} are not here and could not be downloaded")
    (wheel,) = CACHE.glob("*.whl")
    part = CACHE / "part"
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.startswith("torch/include/")]
        archive.extractall(part, names)
    (part / "torch").rename(CACHE / "torch")
    wheel.unlink()


def compiles(*command):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("source", HOST_SOURCES, ids=lambda path: path.name)
def test_host_sources_compile(flags, source):
    compiles("g++", *flags, "-w", "-fsyntax-only", source)


@pytest.mark.skipif(not NVCC, reason="no nvcc here")
@pytest.mark.parametrize("source", CUDA_SOURCES, ids=lambda path: path.name)
def test_cuda_sources_compile(flags, source, tmp_path):
    architectures = ("-arch=compute_80", '-DDMAX_CUDA_ARCHITECTURES="80"')
    compiles(NVCC, *flags, "-w", *architectures, "-ptx", "-o", tmp_path / "out.ptx", source)


def test_the_headers_are_those_of_the_oldest_torch(flags):
    text = (CACHE / "torch/include/torch/headeronly/version.h").read_text()
    parts = [
        re.search(rf"define TORCH_VERSION_{name} (\d+)", text)[1] for name in ("MAJOR", "MINOR")
    ]
    assert ".".join(parts) == OLDEST
