"""The wheel, and what an install says where something is missing."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
SITE = str(Path(torch.__file__).parent.parent)


def run(*command, env=None, cwd=None):
    return subprocess.run(
        [str(part) for part in command],
        env=env,
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


def built(folder, *command):
    """What the command leaves in the folder; isolation fetches the build tools."""
    done = run(sys.executable, "-m", *command)
    if "No matching distribution found for scikit-build-core" in done.stdout + done.stderr:
        pytest.skip("no package registry to fetch the build tools from")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (path,) = folder.glob("dmax_kernels-*")
    return path


@pytest.fixture(scope="session")
def sdist(tmp_path_factory):
    """The sdist of the tracked files."""
    source = tmp_path_factory.mktemp("tracked")
    tracked = run("git", "ls-files", cwd=ROOT)
    if tracked.returncode != 0:
        pytest.skip("not a git checkout: the list of source files is not known")
    for name in tracked.stdout.split("\n"):
        if name and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    folder = tmp_path_factory.mktemp("sdist")
    return built(folder, "build", "--sdist", "--outdir", folder, source)


@pytest.fixture(scope="session")
def wheel(sdist, tmp_path_factory):
    """Built as a user builds it: with isolation, from the sdist, against this torch."""
    folder = tmp_path_factory.mktemp("wheel")
    # The CUDA half takes minutes and has tests of its own
    options = ("--no-deps", "-w", folder, "-C", "cmake.define.DMAX_CUDA=OFF")
    options += ("--build-constraint", ROOT / "requirements.lock")
    return built(folder, "pip", "wheel", *options, sdist)


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory):
    """The wheel unpacked into a folder of its own."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def python(installed, code, cwd, blocked=()):
    """Run code on the installed wheel, as if the blocked packages were not there."""
    hide = f"import sys; sys.modules.update(dict.fromkeys({list(blocked)!r}))\n"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(installed), SITE])}
    return run(sys.executable, "-c", hide + code, env=env, cwd=cwd)


def test_sdist_can_be_built_tested_and_measured(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tracked = set(run("git", "ls-files", cwd=ROOT).stdout.split())
    left_out = {name for name in tracked if (ROOT / name).is_file()} - names
    assert all(name.startswith((".ci/", "bench/results/")) for name in left_out), left_out
    assert names - tracked <= {"PKG-INFO"}


def test_one_wheel_for_every_python(wheel):
    assert wheel.name.split("-")[2:4] == ["py3", "none"]
    names = zipfile.ZipFile(wheel).namelist()
    assert "dmax_kernels/lib/libdmax_cpu.so" in names
    assert not [
        name for name in names if name.startswith(("csrc", "python_tests", "bench", "build"))
    ]
    assert not [name for name in names if name.endswith((".cu", ".cuh", ".cpp", ".h"))]


def test_works_elsewhere_without_triton_and_transformers(installed, tmp_path):
    code = (
        "import torch, dmax_kernels\n"
        f"assert dmax_kernels.__file__.startswith({str(installed)!r}), dmax_kernels.__file__\n"
        "token, confidence = torch.ops.dmax.top1_confidence(torch.eye(4) * 9)\n"
        "assert token.tolist() == [0, 1, 2, 3]\n"
        "assert 'triton' not in [n for n, m in sys.modules.items() if m]\n"
        "from dmax_kernels.__main__ import main\n"
        "sys.exit(main(['info']))\n"
    )
    result = python(installed, code, tmp_path, blocked=("triton", "transformers"))
    assert result.returncode == 0, result.stderr
    assert "top1_confidence" in result.stdout


def test_commands_name_the_package_they_miss(installed, tmp_path):
    code = "from dmax_kernels.__main__ import main; sys.exit(main(['train']))"
    result = python(installed, code, tmp_path, blocked=("transformers",))
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "transformers" in result.stderr
    assert "pip install 'dmax-kernels[loops]'" in result.stderr


def test_stable_abi_only(installed):
    """Every symbol taken from torch is one of the stable ABI's C functions."""
    if not shutil.which("nm"):
        pytest.skip("nm (binutils) is not installed")
    symbols = run("nm", "-D", "--undefined-only", installed / "dmax_kernels/lib/libdmax_cpu.so")
    names = [line.split()[-1] for line in symbols.stdout.splitlines()]
    torch_names = [n for n in names if "torch" in n or "c10" in n or "at6" in n]
    assert torch_names
    assert all(n.startswith(("aoti_torch_", "torch_")) for n in torch_names), torch_names


def test_the_lock_pins_all_that_make_installs():
    """Every direct and indirect requirement of this environment; torch's CUDA packages apart."""
    Requirement = pytest.importorskip("packaging.requirements").Requirement
    locked = [
        Requirement(line)
        for line in (ROOT / "requirements.lock").read_text().splitlines()
        if not line.startswith("#")
    ]
    here = {
        canonical(each.name): each for each in locked if not each.marker or each.marker.evaluate()
    }
    assert all(len(each.specifier) == 1 and "==" in str(each.specifier) for each in locked)
    assert not any(each.url for each in locked)
    if not here["torch"].specifier.contains(metadata.version("torch")):
        pytest.skip("not the environment that `make` made")
    seen, waiting = set(), [name for name in here if is_installed(name)]
    while waiting:
        name = waiting.pop()
        if name in seen or name.startswith(("nvidia-", "cuda-")):
            continue
        seen.add(name)
        assert name in here, name
        for text in metadata.requires(name) or ():
            requirement = Requirement(text)
            if not requirement.marker or requirement.marker.evaluate({"extra": ""}):
                waiting.append(canonical(requirement.name))
    assert {"torch", "triton", "transformers", "numpy", "pytest", "ruff", "jinja2"} <= seen


def canonical(name):
    return name.lower().replace("_", "-").replace(".", "-")


def is_installed(name):
    try:
        return bool(metadata.version(name))
    except metadata.PackageNotFoundError:
        return False


def configure(tmp_path, **options):
    env = options.pop("env", None)
    flags = [f"-D{name}={value}" for name, value in options.items()]
    cmake = shutil.which("cmake", path=os.path.dirname(sys.executable) + ":" + os.environ["PATH"])
    return run(cmake, "-S", ROOT, "-B", tmp_path / "build", "-G", "Ninja", *flags, env=env)


def bare_environment(tmp_path):
    """A Python without torch, as uv and `python -m build` make for a build, and a PATH without."""
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", bare], check=True)
    for tool in ("ninja", "c++", "g++", "as", "ld"):
        if path := shutil.which(tool, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}"):
            (bare / "bin" / tool).symlink_to(path)
    env = {k: v for k, v in os.environ.items() if k not in ("CXX", "CC", "VIRTUAL_ENV")}
    return bare / "bin/python", env | {"PATH": str(bare / "bin")}


def test_without_torch_the_build_says_so(tmp_path):
    python, env = bare_environment(tmp_path)
    result = configure(tmp_path, env=env, Python_EXECUTABLE=python, DMAX_CUDA="OFF")
    assert result.returncode != 0
    message = " ".join(result.stderr.split())
    assert f"builds against the installed PyTorch, and neither {python} nor a python3" in message
    assert "pip install 'torch>=2.10'" in message
    assert "--no-build-isolation (uv pip install) or --no-isolation (python -m build)" in message


def test_the_torch_of_the_activated_environment_is_found(tmp_path):
    """Where the build's own environment has none: uv, `python -m build`."""
    python, env = bare_environment(tmp_path)
    activated = tmp_path / "activated"
    activated.mkdir()
    (activated / "python3").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (activated / "python3").chmod(0o755)
    env["PATH"] += f":{activated}:/usr/bin:/bin"
    result = configure(tmp_path, env=env, Python_EXECUTABLE=python, DMAX_CUDA="OFF")
    assert result.returncode == 0, result.stderr


def test_without_a_compiler_the_build_says_so(tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    path = os.path.dirname(sys.executable) + ":" + os.environ["PATH"]
    (tools / "ninja").symlink_to(shutil.which("ninja", path=path))
    env = {k: v for k, v in os.environ.items() if k not in ("CXX", "CC")} | {"PATH": str(tools)}
    result = configure(tmp_path, env=env, Python_EXECUTABLE=sys.executable)
    assert result.returncode != 0
    message = " ".join(result.stderr.split())
    assert "dmax_kernels needs a C++17 compiler (g++ or clang++) and found none" in message


def test_unbuilt_sources_say_so(tmp_path):
    shutil.copytree(ROOT / "dmax_kernels", tmp_path / "dmax_kernels", ignore=lambda *_: ["lib"])
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = run(sys.executable, "-c", "import dmax_kernels", env=env, cwd=tmp_path)
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert "was not built" in last
    assert "pip install ." in last
