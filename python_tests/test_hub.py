"""The Hugging Face kernel of ``make hub``: its form; slow: two builds of its CPU variant."""

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import dmax_kernels

tomllib = pytest.importorskip("tomllib", reason="tomllib came with Python 3.11")
ROOT = Path(__file__).parent.parent
CXX = os.environ.get("CXX", "c++")


@pytest.fixture(scope="module")
def layout(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    command = (sys.executable, ROOT / "release/hub.py", "--output", folder / "hub")
    subprocess.run(
        [str(part) for part in (*command, "--repo-id", "someone/dmax-kernels")], check=True
    )
    return folder / "hub"


@pytest.fixture(scope="module")
def config(layout):
    return tomllib.loads((layout / "build.toml").read_text())


def python_files(layout):
    return sorted((layout / "torch-ext").rglob("*.py"))


def test_python_imports_only_itself_torch_and_the_standard_library(layout):
    allowed = sys.stdlib_module_names | {"torch", "triton"}
    for path in python_files(layout):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            else:
                continue
            assert {name.split(".")[0] for name in names} <= allowed, (path, names)


def test_no_name_outside_the_builders_namespace(layout):
    """Two versions in one process must not meet: not in Python's op names, nor in C++'s."""
    for path in python_files(layout):
        assert not re.search(r"dmax::|torch\.ops\.|import_module\(.?\"dmax", path.read_text()), path
    sources = [path for path in (layout / "csrc").rglob("*") if path.is_file()]
    binding = layout / "torch-ext/torch_binding.cpp"
    for path in (*sources, binding):
        registrations = re.findall(r"STABLE_TORCH_LIBRARY\w*\(\w+", path.read_text())
        assert all(r.endswith("_EXPAND(TORCH_EXTENSION_NAME") for r in registrations), path
    assert "REGISTER_EXTENSION(TORCH_EXTENSION_NAME)" in binding.read_text()
    schemas = (ROOT / "csrc/schemas.cpp").read_text()
    assert binding.read_text().count("m.def(") == schemas.count("m.def(")


def test_every_registration_shows_the_builder_its_prefix(layout):
    """The builder refuses a decorator whose first argument is not the prefix's own call."""
    decorated = 0
    for path in (layout / "torch-ext/dmax_kernels/ops").glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            for decorator in getattr(node, "decorator_list", ()):
                if "register_fake" in ast.unparse(decorator):
                    assert ast.unparse(decorator.args[0]).startswith("add_op_namespace_prefix(")
                    decorated += 1
    assert decorated >= len(dmax_kernels.ops.__all__) - 2


def test_build_toml_lists_every_source(layout, config):
    """The builder sees no file that is not listed, and compiles a file once."""
    sections = [config["torch"], *config["kernel"].values()]
    listed = [name for section in sections for name in section["src"]]
    assert len(listed) == len(set(listed))
    there = {str(p.relative_to(layout)) for p in (layout / "csrc").rglob("*") if p.is_file()}
    assert set(listed) == there | {"torch-ext/torch_binding.cpp"}
    assert config["general"]["edition"] == 5
    assert set(config["torch"]["stable-abi"]) == set(config["general"]["backends"])
    version = config["general"]["version"]
    tests = (layout / "tests/test_dmax_kernels.py").read_text()
    assert f'get_kernel("someone/dmax-kernels", version={version})' in tests


def test_cpu_flags_are_those_of_our_own_build(config):
    """The bits of the results are promised: no flag that could change them may differ."""
    commands = ROOT / "build/dev/build.ninja"
    if not commands.is_file():
        pytest.skip("no build in build/dev to compare with")
    for isa in ("portable", "avx2", "avx512"):
        found = re.search(rf"DMAX_ISA={isa}\n.*?FLAGS = ([^\n]*)", commands.read_text(), re.DOTALL)
        ours = {flag for flag in found[1].split() if flag.startswith(("-m", "-f", "-O"))}
        hub = config["kernel"][f"dmax_cpu_{isa}"]["cxx-flags"]
        assert ours - {"-fPIC", "-fvisibility=hidden"} == set(hub) - {"-Wno-psabi"}


# ---- What the builder adds, written anew for this test; the names are its own ----

REGISTRATION = """
#pragma once
#include <Python.h>
#define STABLE_TORCH_LIBRARY_EXPAND(NAME, MODULE) STABLE_TORCH_LIBRARY(NAME, MODULE)
#define STABLE_TORCH_LIBRARY_IMPL_EXPAND(NAME, DEVICE, MODULE) \\
  STABLE_TORCH_LIBRARY_IMPL(NAME, DEVICE, MODULE)
#define DMAX_JOIN(A, B) A##B
#define DMAX_INIT(NAME) DMAX_JOIN(PyInit_, NAME)
#define DMAX_TEXT(NAME) #NAME
#define DMAX_NAME(NAME) DMAX_TEXT(NAME)
#define REGISTER_EXTENSION(NAME)                                                \\
  PyMODINIT_FUNC DMAX_INIT(NAME)() {                                            \\
    static PyModuleDef module = {PyModuleDef_HEAD_INIT, DMAX_NAME(NAME), nullptr, 0, nullptr}; \\
    return PyModule_Create(&module);                                            \\
  }
"""
OPS = """
import torch
from . import {name}
ops = torch.ops.{name}
def add_op_namespace_prefix(op_name):
    return "{name}::" + op_name
"""


def compile_cpu_variant(layout, config, name, folder):
    """One shared library by build.toml's CPU sections, beside the Python of torch-ext."""
    package = folder / name / "package"
    shutil.copytree(layout / "torch-ext/dmax_kernels", package)
    (package / "_ops.py").write_text(OPS.format(name=name))
    (layout / "torch-ext/registration.h").write_text(REGISTRATION)
    torch_folder = Path(torch.__file__).parent
    # C++20 and -fno-gnu-unique: as the builder does for torch 2.12 and newer
    common = [
        *os.environ.get("CMAKE_CXX_COMPILER_LAUNCHER", "").split(),
        *(CXX, "-c", "-std=c++20", "-fPIC", "-O3", "-DNDEBUG", "-fno-gnu-unique"),
        *("-DPy_LIMITED_API=0x03090000", "-DCPU_KERNEL", f"-DTORCH_EXTENSION_NAME={name}"),
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
        *("-isystem", f"{torch_folder}/include", "-isystem", sysconfig.get_paths()["include"]),
    ]
    jobs = []
    for section in (config["torch"], *config["kernel"].values()):
        if section.get("backend", "cpu") != "cpu":
            continue
        for source in section["src"]:
            if source.endswith(".cpp"):
                target = folder / name / (source.replace("/", "_") + ".o")
                includes = [f"-I{path}" for path in section["include"]]
                flags = section.get("cxx-flags", [])
                jobs.append([*common, *includes, *flags, source, "-o", str(target)])

    def compile_one(job):
        return subprocess.run(job, cwd=layout, capture_output=True, text=True, check=False)

    with ThreadPoolExecutor(2) as pool:
        for job, done in zip(jobs, pool.map(compile_one, jobs), strict=True):
            assert done.returncode == 0, (job[-3], done.stderr[-3000:])
    link = [CXX, "-shared", "-Wl,--no-as-needed", *(job[-1] for job in jobs)]
    library = torch_folder / "lib"
    link += [str(library / "libtorch_cpu.so"), "-o", str(package / f"{name}.abi3.so")]
    subprocess.run(link, check=True)
    return package


def load_from(package, module_name):
    """As the kernels library does: by path, under a name of its own, outside sys.path."""
    spec = importlib.util.spec_from_file_location(module_name, package / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which(CXX), reason="no C++ compiler")
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="build.toml's CPU flags are x86-64's")
def test_two_builds_in_one_process(layout, config, tmp_path):
    names = ("_dmax_kernels_cpu_first", "_dmax_kernels_cpu_second")
    hubs = [
        load_from(compile_cpu_variant(layout, config, name, tmp_path), f"hub{name}")
        for name in names
    ]
    assert set(hubs[0].__all__) - {"reference"} == set(dmax_kernels.ops.__all__)
    logits = 4 * torch.randn(2, 32, 5003, generator=torch.Generator().manual_seed(0))
    embedding = torch.randn(5003, 96, generator=torch.Generator().manual_seed(1))
    target = torch.randint(0, 5003, (2, 32), generator=torch.Generator().manual_seed(2))
    masked = torch.arange(64).reshape(2, 32) % 3 == 0

    def results(module):
        token, confidence = module.top1_confidence(logits.bfloat16())
        hybrid = module.hybrid_embedding(embedding, token, confidence, masked, 7)
        hidden = embedding[:64].clone().requires_grad_()
        loss = module.linear_oput_loss(hidden, None, embedding, target.flatten(), reduction="mean")
        loss.backward()
        statistics = module.row_statistics(logits.half())
        return [token, confidence, hybrid, loss.detach(), hidden.grad, *statistics]

    expected = results(dmax_kernels)
    for hub, name in zip(hubs, names, strict=True):
        assert all(a.equal(b) for a, b in zip(results(hub), expected, strict=True))
        assert hub.reference.top1_confidence(logits)[0].equal(hub.top1_confidence(logits)[0])
        torch.library.opcheck(
            getattr(torch.ops, name).top1_confidence.default, (logits,), {"temperature": 0.5}
        )
        compiled = torch.compile(hub.top1_confidence, fullgraph=True, backend="aot_eager")
        assert compiled(logits)[0].equal(logits.argmax(-1))
        with pytest.raises(RuntimeError, match="top1_confidence: has no gradient"):
            hub.top1_confidence(logits.clone().requires_grad_())[1].sum().backward()
