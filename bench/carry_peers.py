"""``python bench/carry_peers.py``: the peers of bench/peers.py, ready for a GPU without a network.

Needs a network, nvcc and no GPU; run it with the Python and the torch of the machine that has the
GPU. Downloads the versions below, compiles for sm_90a what their first call would compile with
nvcc (FlashInfer's samplers and top-k) or with a compiler too large to carry (QuACK's row kernels),
and packs what is needed into .peers/peers.tar.xz. There, from the root of the repository:

    tar xf .peers/peers.tar.xz -C /tmp && . /tmp/peers/setup.sh

The rest compiles through Triton at its first call. Where there is a network, ``pip install`` of
the first four and of quack-kernels does as well, except that FlashInfer then compiles for minutes.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PEERS = (
    "flashinfer-python==0.7.2.post1",
    "apache-tvm-ffi==0.1.15.post2",
    "liger-kernel==0.8.5",
    "cut-cross-entropy==25.1.1",
)
# What importing FlashInfer asks for and an image may lack
MORE = ("einops", "nvidia-ml-py", "requests", "tabulate", "urllib3", "idna", "charset-normalizer")
COMPILER = (
    "quack-kernels==0.6.5",
    *(
        f"nvidia-cutlass-dsl{part}==4.8.1"
        for part in ("", "-libs-base", "-libs-core", "-libs-cu13")
    ),
    "torch-c-dlpack-ext",
    "einops",
    "protobuf",
)
ARCHITECTURE = "9.0a"
SETUP = """\
export PYTHONPATH=/tmp/peers/site
python3 -c 'import einops, pynvml, requests, tabulate' 2>/dev/null ||
  export PYTHONPATH=/tmp/peers/site:/tmp/peers/more
export FLASHINFER_WORKSPACE_BASE=/tmp/peers/workspace
export FLASHINFER_DISABLE_JIT=1
"""
BUILD_MODULES = """\
from flashinfer.jit.sampling import gen_sampling_module
from flashinfer.jit.topk import gen_topk_module
for spec in (gen_sampling_module(), gen_topk_module()):
    spec.build(verbose=True)
    print("built", spec.name, spec.jit_library_path)
"""


def install(folder: Path, names: tuple[str, ...]) -> None:
    if folder.exists():
        return
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-compile"]
    unfinished = folder.with_name(f"{folder.name}-unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    subprocess.run([*command, "--target", unfinished, *names], check=True)
    unfinished.rename(folder)


def run_python(arguments: list, path: list[Path], **environment: str) -> str:
    """Runs this Python with these folders on its path; returns what it printed."""
    environment |= {"PYTHONPATH": ":".join(map(str, path)), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=os.environ | environment, check=True, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    return done.stdout


def build_flashinfer(work: Path) -> list[Path]:
    """The libraries of its samplers and its top-k."""
    headers, libraries = work / "headers", work / "libraries"
    for folder in (headers, libraries):
        folder.mkdir(exist_ok=True)
    # A toolkit without curand takes the headers of the copy that torch brings
    spec = importlib.util.find_spec("nvidia")
    for location in spec.submodule_search_locations if spec else ():
        for header in Path(location).glob("*/include/curand*.h"):
            shutil.copy(header, headers)
    # The linker wants the driver's library by name, though nothing is taken from it here
    subprocess.run(
        ["gcc", "-shared", "-Wl,-soname,libcuda.so.1", "-x", "c", "/dev/null",
         "-o", libraries / "libcuda.so"],
        check=True,
    )  # fmt: skip
    printed = run_python(
        ["-c", BUILD_MODULES],
        [work / "site", work / "more"],
        FLASHINFER_WORKSPACE_BASE=str(work / "workspace"),
        FLASHINFER_CUDA_ARCH_LIST=ARCHITECTURE,
        FLASHINFER_EXTRA_CUDAFLAGS=f"-isystem {headers}",
        FLASHINFER_EXTRA_LDFLAGS=f"-L{libraries}",
    )
    return [Path(line.split()[-1]) for line in printed.splitlines() if line.startswith("built ")]


def build_quack(work: Path) -> Path:
    folder, compiler = work / "quack_ahead", work / "compiler"
    if not (folder / "__init__.py").exists():
        install(compiler, COMPILER)
        run_python(
            [ROOT / "bench" / "quack_ahead.py", folder],
            [work / "site", compiler, compiler / "nvidia_cutlass_dsl" / "dsl_packages"],
            QUACK_ARCH="90",
            CUTE_DSL_ARCH="sm_90a",
            QUACK_CACHE_ENABLED="0",
        )
    return folder


def pack(work: Path, modules: list[Path], quack: Path | None, output: Path) -> Path:
    """peers.tar.xz: the packages, with FlashInfer's modules where it looks for compiled ones."""

    def needed(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
        name = entry.name.removeprefix("peers/site/")
        source = name.startswith("flashinfer/") and name.endswith((".cu", ".cuh", ".h"))
        unneeded = source or name.startswith("flashinfer/data") or "__pycache__" in name
        return None if unneeded else entry

    setup = work / "setup.sh"
    setup.write_text(SETUP)
    output.mkdir(parents=True, exist_ok=True)
    archive = output / "peers.tar.xz"
    with tarfile.open(archive, "w:xz", preset=3) as file:
        file.add(setup, "peers/setup.sh")
        for folder in ("site", "more"):
            file.add(work / folder, f"peers/{folder}", filter=needed)
        for module in modules:
            place = f"peers/site/flashinfer/data/aot/{module.stem}/{module.name}"
            file.add(module, place)
        if quack:
            file.add(quack, "peers/site/quack_ahead", filter=needed)
    return archive


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, default=ROOT / "build" / "peers", help="kept in between"
    )
    parser.add_argument("--output", type=Path, default=ROOT / ".peers")
    options = parser.parse_args()
    work = options.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    install(work / "site", PEERS)
    install(work / "more", MORE)
    modules = build_flashinfer(work)
    quack: Path | None = None
    try:
        quack = build_quack(work)
    except subprocess.CalledProcessError as error:  # the others are worth carrying without it
        print(f"QuACK's kernels were not compiled: {error}", file=sys.stderr)
    archive = pack(work, modules, quack, options.output)
    print(f"wrote {archive}, {archive.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
