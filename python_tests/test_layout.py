"""Where things are: an op's file follows from its family and its backend.

A failure says what to do. The families are read from the ops themselves: FAMILY_OF holds the file
of dmax_kernels/ops in which an op's fake kernel stands.
"""

import ast
import re
from collections import Counter
from pathlib import Path

import dmax_kernels
from bench.cases import cases_of
from dmax_kernels import reference
from dmax_kernels.ops._register import FAMILY_OF

ROOT = Path(__file__).parent.parent
FAMILIES = sorted(set(FAMILY_OF.values()))
PUBLIC = sorted(op for op in FAMILY_OF if op in dmax_kernels.__all__)
# The files of every family. In C++ linear is two files on the CPU, rows and loss. Families with a
# matrix product have no CUDA kernels: it is Triton's there.
DOORS = ("dmax_kernels/ops/{}.py", "dmax_kernels/reference/{}.py", "dmax_kernels/triton/{}.py")
CPU_DOORS = ("csrc/cpu/{}.cpp",)
CUDA_DOORS = ("csrc/cuda/{}.cu", "csrc/cuda/{}.cuh")
PRODUCTS = ("linear", "soft_embedding")
HELPERS = {
    # target_logprobs is a composition of ops, and no op itself
    "dmax_kernels/ops": {"_register", "_linear_loss_autograd", "_linear_logprobs_autograd"}
    | {"_logprob_blocks", "_temperature", "target_logprobs"},
    "dmax_kernels/reference": {"target_logprobs"},
    # Shared by families; the two halves of linear, and its way by chunks of the vocabulary
    "dmax_kernels/triton": {"launch", "philox", "stats", "linear_rows", "linear_loss"}
    | {"linear_gradients", "linear_chunks", "draw", "sample_filters", "filter_search"}
    | {"soft_products", "topk"},
    "csrc/cuda": {"host"},
}
# Ops that are tested and measured together with the op that makes their input
MEASURED_AS = {"top1_merge": "top1_partial", "sample_merge": "sample_partial"} | {
    "soft_embedding_partial": "soft_embedding"
}
MOST_LINES = {"csrc": 350, "dmax_kernels": 350, "bench": 350, "release": 350, "python_tests": 450}
LONGER = {
    "csrc/simt/executor.cpp": "one machine, whose parts share all of its state",
    "dmax_kernels/ops/linear.py": "four public functions, most of it what they promise",
    "dmax_kernels/triton/linear_gradients.py": "three ops over one walk through the vocabulary",
    "dmax_kernels/triton/loss.py": "forward, backward and in-place kernels of one formula",
    "bench/kernels.py": "one report, whose tables share a model of the GPU",
}


def text_of(path):
    return (ROOT / path).read_text()


def test_every_family_has_its_files():
    paths = [door.format(family) for family in FAMILIES for door in DOORS]
    paths += [door.format(f) for f in FAMILIES if f != "linear" for door in CPU_DOORS]
    paths += [door.format(f) for f in FAMILIES if f not in PRODUCTS for door in CUDA_DOORS]
    missing = [path for path in paths if not (ROOT / path).is_file()]
    assert not missing, f"add {missing}: each family of ops has one file in each of these folders"
    for family in FAMILIES:
        tests = list((ROOT / "python_tests").glob(f"test_{family}*.py"))
        assert tests, f"add python_tests/test_{family}.py, with the values of the family's ops"


def test_no_file_without_a_family():
    for folder, helpers in HELPERS.items():
        pattern = "*.cu" if folder == "csrc/cuda" else "*.py"
        names = {path.stem for path in (ROOT / folder).glob(pattern)} - {"__init__"}
        strangers = names - set(FAMILIES) - helpers
        assert not strangers, f"move {strangers} of {folder} into a family, or name it in HELPERS"


def test_an_ops_name_stands_where_it_must():
    schemas, checks = text_of("csrc/schemas.cpp"), text_of("csrc/checks/checks.cpp")
    measured = {case.workload for case in cases_of()}
    to_do = []
    for op, family in FAMILY_OF.items():
        name = re.compile(rf"\b{op}\b")
        if f'"{op}(' not in schemas:
            to_do.append(f"define {op} in csrc/schemas.cpp")
        if not name.search(checks):
            to_do.append(f"register the check of {op} in csrc/checks/checks.cpp")
        if not name.search(text_of(f"dmax_kernels/triton/{family}.py")):
            to_do.append(f"implement {op} in dmax_kernels/triton/{family}.py")
        if op not in PUBLIC:  # a gradient
            continue
        for folder in ("ops", "reference"):
            path = f"dmax_kernels/{folder}/{family}.py"
            if f"def {op}(" not in text_of(path):
                to_do.append(f"write {op} in {path}")
        tests = (ROOT / "python_tests").glob(f"test_{family}*.py")
        if not any(name.search(path.read_text()) for path in tests):
            to_do.append(f"test {op} in python_tests/test_{family}.py")
        if not {op, MEASURED_AS.get(op), op.removesuffix("_and_grad_")} & measured:
            to_do.append(
                f"add a workload for {op} in dmax_kernels/bench and a case in bench/cases.py"
            )
    assert not to_do, "; ".join(to_do)


def test_public_names_are_the_same_everywhere():
    public = {name for name in dmax_kernels.__all__ if not name.startswith("__")}
    different = public ^ set(reference.__all__)
    assert not different, f"{different}: list it in __all__ of both dmax_kernels.ops and .reference"


def test_every_schema_is_an_op():
    schemas = set(re.findall(r'"(\w+)\(', text_of("csrc/schemas.cpp")))
    unknown = {name for name in schemas if not name.startswith("_check_")} - set(FAMILY_OF)
    assert not unknown, f"register a fake kernel of {unknown} in its family's file of ops/"


def test_public_functions_state_their_contract():
    for op in PUBLIC:
        doc = getattr(dmax_kernels, op).__doc__
        for section in ("Args:", "written" if op.endswith("_step_") else "Returns:", "Raises:"):
            assert section in doc, f"write a section {section!r} in the docstring of {op}"


def test_every_op_is_registered_once():
    """The CPU library has every op; the CUDA library all but the products, which are Triton's."""
    on_gpu = {op for op, family in FAMILY_OF.items() if family not in PRODUCTS}
    for folder, suffix, ops in (("cpu", ".cpp", set(FAMILY_OF)), ("cuda", ".cu", on_gpu)):
        sources = [path.read_text() for path in (ROOT / "csrc" / folder).glob(f"*{suffix}")]
        counts = Counter(re.findall(r'm\.impl\(\s*"(\w+)"', "".join(sources)))
        wrong = sorted(op for op in ops | set(counts) if counts[op] != (op in ops))
        assert not wrong, f"register {wrong} once each, by m.impl in csrc/{folder}/*{suffix}"


def test_device_code_knows_no_torch():
    """The CUDA emulator in csrc/simt compiles it without PyTorch."""
    for path in (ROOT / "csrc/cuda").glob("*.cuh"):
        used = re.search(r"torch|stable|Tensor", path.read_text())
        assert not used, f"move what needs {used[0]!r} from {path.name} to its .cu file"


def code_files():
    for folder in MOST_LINES:
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh"):
                yield folder, path.relative_to(ROOT).as_posix()


def test_no_file_is_too_long_to_hold_in_the_head():
    for folder, path in code_files():
        lines, most = len(text_of(path).splitlines()), MOST_LINES[folder]
        assert lines <= most or path in LONGER, (
            f"{path} has {lines} lines: split it, or cut it to {most}, or give a reason in LONGER"
        )
        assert lines > most or path not in LONGER, f"take {path} out of LONGER: it is short enough"


def imports_of(path, modules):
    """The modules of the package that a file imports when it is itself imported."""
    tree = ast.parse(path.read_text())
    for node in tree.body:  # not those inside functions, nor those for type checkers
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom):
            if node.level:  # only in files that are exported with a model
                continue
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in modules else node.module


def test_no_module_imports_itself_in_a_circle():
    files = {}
    for path in (ROOT / "dmax_kernels").rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    edges = {m: {i for i in imports_of(p, files) if i in files} for m, p in files.items()}
    done = set()

    def visit(module, way):
        circle = " -> ".join([*way[way.index(module) :], module]) if module in way else ""
        assert not circle, f"{circle}: move what they share into a module of its own"
        if module not in done:
            for imported in sorted(edges[module]):
                visit(imported, [*way, module])
            done.add(module)

    for module in edges:
        visit(module, [])
