"""One op, one name: a new op is one word in CMakeLists.txt, its schema, and one file per folder."""

import re
from pathlib import Path

import dmax_kernels
from bench.cases import cases_of
from dmax_kernels import reference

ROOT = Path(__file__).parent.parent
OPS = re.search(r"set\(DMAX_OPS\s+(.*?)\)", (ROOT / "CMakeLists.txt").read_text(), re.DOTALL)[1]
OPS = OPS.split()
# A test and a workload may serve an op and its twin
SHARED = {"top1_merge": "top1_partial", "sample_merge": "sample_partial"}


def test_every_op_has_its_files():
    missing = [
        path
        for op in OPS
        for path in (
            f"csrc/cpu/{op}.cpp",
            f"dmax_kernels/ops/{op}.py",
            f"dmax_kernels/reference/{op}.py",
            f"dmax_kernels/triton/{op}.py",
            f"python_tests/test_{SHARED.get(op, op)}.py",
        )
        if not (ROOT / path).is_file()
    ]
    assert not missing


def test_every_op_is_measured():
    measured = {case.workload for case in cases_of()}
    assert {SHARED.get(op, op) for op in OPS} <= measured


def test_cuda_families_have_a_host_and_a_device_side():
    """csrc/cuda/<family>.cu and <family>.cuh; between them they register every op but the linear
    ones, which are Triton's, once."""
    cmake = (ROOT / "csrc/cuda/CMakeLists.txt").read_text()
    families = re.search(r"set\(DMAX_CUDA_FAMILIES\s+(.*?)\)", cmake, re.DOTALL)[1].split()
    host = {path.stem for path in (ROOT / "csrc/cuda").glob("*.cu")} - {"host"}
    assert host == set(families)
    assert all((ROOT / f"csrc/cuda/{family}.cuh").is_file() for family in families)
    sources = [(ROOT / f"csrc/cuda/{family}.cu").read_text() for family in families]
    registered = re.findall(r'm\.impl\(\s*"(\w+)"', "".join(sources))
    schemas = re.findall(r'"(\w+)\(', (ROOT / "csrc/schemas.cpp").read_text())
    assert sorted(registered) == sorted(s for s in schemas if not s.startswith("linear_"))


def test_no_op_file_without_an_op():
    helpers = {"__init__", "_register"}
    for folder, pattern in (
        ("dmax_kernels/ops", "*.py"),
        ("dmax_kernels/reference", "*.py"),
    ):
        names = {path.stem for path in (ROOT / folder).glob(pattern)} - helpers
        assert names <= set(OPS), folder


def test_public_names_are_the_same_everywhere():
    public = {name for name in dmax_kernels.__all__ if not name.startswith("__")}
    assert public == set(reference.__all__)
    assert set(OPS) <= public


def test_every_schema_is_an_op_or_its_gradient():
    schemas = re.findall(r'"(\w+)\(', (ROOT / "csrc/schemas.cpp").read_text())
    derived = {f"{op}_backward" for op in OPS} | {f"{op}_and_grad_" for op in OPS}
    assert set(OPS) <= set(schemas) <= set(OPS) | derived


def test_device_code_knows_no_torch():
    for path in (ROOT / "csrc/cuda").glob("*.cuh"):
        assert not re.search(r"torch|stable|Tensor", path.read_text()), path.name


def test_public_functions_state_their_contract():
    for name in sorted(set(OPS)):
        doc = getattr(dmax_kernels, name).__doc__
        for part in ("Args:", "Returns:" if name != "spd_step_" else "written", "Raises:"):
            assert part in doc, (name, part)
