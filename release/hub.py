"""``make hub``: writes the layout that Hugging Face's kernel-builder builds, from the same sources.

    build/hub/build.toml, flake.nix, CARD.md, tests/, benchmarks/
    build/hub/csrc/                        the C++ and CUDA kernels
    build/hub/torch-ext/torch_binding.cpp  the schemas
    build/hub/torch-ext/dmax_kernels/      ops, reference, reduction, triton

A Hub kernel may be loaded in several versions at once and from any folder. So its ops do not live
in ``torch.ops.dmax`` but in a namespace that the builder invents for each build, and its Python
imports itself relatively only. That is what is rewritten here; the decoding and training loops,
which need transformers, stay with the wheel. The builder adds registration.h, which defines the
``_EXPAND`` macros, and _ops.py, which knows the namespace.
"""

from __future__ import annotations

import argparse
import ast
import re
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FIXED = ROOT / "release" / "hub_files"  # what is copied as it is, but for @...@
PACKAGE = Path("torch-ext/dmax_kernels")
KERNEL_VERSION = 0  # by the Hub's convention: still changing
# PTX of the oldest serves what comes between and after: the wheel leaves those GPUs to Triton
CUDA_CAPABILITIES = ["8.0+PTX", "9.0", "10.0"]
ISAS = ("portable", "avx2", "avx512", "amx")  # the builder has no list per processor: x86-64 only
CUDA_NAMES = "80 90 100, or newer by PTX"


def cmake_list(name: str) -> list[str]:
    """The words of set(name ...) in CMakeLists.txt, with the variables in them resolved."""
    text = (ROOT / "CMakeLists.txt").read_text()
    found = re.search(rf"set\({re.escape(name)}\s([^)]*)\)", text)
    if not found:
        raise SystemExit(f"make hub: CMakeLists.txt has no set({name} ...)")
    words = found[1].replace('"', " ").split()
    return [
        part
        for word in words
        for part in (cmake_list(word[2:-1]) if word.startswith("${") else [word])
    ]


def replaced(text: str, pattern: str, by: str, where: Path) -> str:
    """re.sub that has to find something: a source that changed its form must not slip through."""
    text, count = re.subn(pattern, by, text, flags=re.DOTALL)
    if not count:
        raise SystemExit(f"make hub: {where} has nothing like {pattern}")
    return text


# ---- C++ and CUDA ----


def cxx(path: Path) -> str:
    """One file of csrc, its ops registered in the builder's namespace."""
    text = (ROOT / path).read_text()
    text = re.sub(
        r"STABLE_TORCH_LIBRARY_IMPL\(dmax, (\w+), m\)",
        r"STABLE_TORCH_LIBRARY_IMPL_EXPAND(TORCH_EXTENSION_NAME, \1, m)",
        text,
    )
    if path.name == "torch_stable.h":
        text = replaced(text, "#pragma once\n", '#pragma once\n\n#include "registration.h"\n', path)
    if path.name == "host.cu":
        define = f'#define DMAX_CUDA_ARCHITECTURES "{CUDA_NAMES}"\n'
        text = replaced(text, r"#ifndef DMAX_CUDA_ARCHITECTURES\n.*?#endif\n", define, path)
    return text


def torch_binding() -> str:
    path = Path("csrc/schemas.cpp")
    text = replaced(
        (ROOT / path).read_text(),
        r"STABLE_TORCH_LIBRARY\(dmax, m\)",
        "STABLE_TORCH_LIBRARY_EXPAND(TORCH_EXTENSION_NAME, m)",
        path,
    )
    text = text.replace("torch.ops.dmax", "torch.ops.<the namespace of this build>")
    return text + "\nREGISTER_EXTENSION(TORCH_EXTENSION_NAME)\n"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def kernel_section(name: str, backend: str, sources: list[str], **options: list[str]) -> str:
    lines = [f"[kernel.{name}]", f'backend = "{backend}"', 'depends = ["torch"]']
    for key, value in ({"include": ["csrc", "torch-ext"]} | options).items():
        lines.append(f"{key.replace('_', '-')} = {toml(value)}")
    return "\n".join([*lines, f"src = {toml(sources)}", ""])


def toml(values: list[str]) -> str:
    one_line = "[" + ", ".join(f'"{value}"' for value in values) + "]"
    if len(one_line) <= 80:
        return one_line
    return "[\n" + "".join(f'  "{value}",\n' for value in values) + "]"


def isa_sections(output: Path) -> list[str]:
    """The loops that are compiled once per instruction set. The builder compiles a file once, so
    the loops become a header and each set gets a file of its own that includes it."""
    sections = []
    for isa in ISAS:
        sources = "DMAX_ISA_SOURCES_amx" if isa == "amx" else "DMAX_ISA_SOURCES_${isa}"
        listed = []
        for source in map(Path, cmake_list(sources)):
            header = source.with_suffix(".h")
            wrapper = source.with_name(f"{re.sub('_(isa|amx)$', '', source.stem)}_{isa}.cpp")
            text = f'#define DMAX_ISA {isa}\n#include "{header.relative_to("csrc")}"\n'
            write(output / header, cxx(source))
            write(output / wrapper, text)
            listed.append(str(wrapper))
        flags = cmake_list("DMAX_ISA_FLAGS") + cmake_list(f"DMAX_FLAGS_{isa}")
        sections.append(kernel_section(f"dmax_cpu_{isa}", "cpu", listed, cxx_flags=flags))
    return sections


def write_cxx(output: Path) -> str:
    """csrc, and the part of build.toml that lists it."""
    per_isa = {path for isa in ("${isa}", "amx") for path in cmake_list(f"DMAX_ISA_SOURCES_{isa}")}
    listed: dict[str, list[str]] = {}
    for path in sorted((ROOT / "csrc").rglob("*")):
        name = path.relative_to(ROOT)
        folder = name.parts[1]
        if folder not in ("common", "ops", "cpu", "cuda") or str(name) in per_isa:
            continue
        if path.suffix in (".h", ".cpp", ".cu", ".cuh"):
            write(output / name, cxx(name))
            listed.setdefault(folder, []).append(str(name))
    write(output / "torch-ext" / "torch_binding.cpp", torch_binding())

    isas = isa_sections(output)
    headers = [str(Path(path).with_suffix(".h")) for path in sorted(per_isa)]
    have = [f"-DDMAX_HAVE_{isa.upper()}" for isa in ISAS]
    binding = ["torch-ext/torch_binding.cpp", *listed["common"], *listed["ops"]]
    sections = [
        f'[torch]\ninclude = ["csrc", "torch-ext"]\nsrc = {toml(binding)}\n',
        # The oldest torch whose stable ABI the sources use
        '[torch.stable-abi]\ncpu = "2.10"\ncuda = "2.10"\n',
        kernel_section("dmax_cpu", "cpu", listed["cpu"] + headers, cxx_flags=have),
        *isas,
        kernel_section("dmax_cuda", "cuda", listed["cuda"], cuda_capabilities=CUDA_CAPABILITIES),
    ]
    return "\n".join(sections)


# ---- Python ----


def relative_imports(text: str, module: Path) -> str:
    """``from dmax_kernels.ops.x import y`` in ops/z.py becomes ``from ..ops.x import y``."""
    dots = "." * len(module.parts)
    return re.sub(r"^(\s*from )dmax_kernels\.", rf"\1{dots}", text, flags=re.MULTILINE)


def namespaced(text: str) -> str:
    """The ops by the names that _ops.py knows."""
    # The builder looks for the prefix at each decorator, so the helper gets the whole name
    text = re.sub(
        r'@register_fake\(("\w+")\)', r"@register_fake(add_op_namespace_prefix(\1))", text
    )
    text = text.replace('register_fake(f"dmax::{name}")', "register_fake(name)")
    text = text.replace('f"dmax::{name}"', "add_op_namespace_prefix(name)")
    text = re.sub(r'"dmax::(\w+)"', r'add_op_namespace_prefix("\1")', text)
    text = text.replace("torch.ops.dmax.", "ops.")
    used = [
        name
        for name, pattern in (
            ("add_op_namespace_prefix", r"add_op_namespace_prefix\("),
            ("ops", r"(?<![.\w])ops\.\w"),
        )
        if re.search(pattern, text)
    ]
    if not used:
        return text
    line = f"from .._ops import {', '.join(used)}\n"
    if re.search(r"^from \.", text, re.MULTILINE):
        return re.sub(r"^from \.", f"{line}from .", text, count=1, flags=re.MULTILINE)
    return text.replace("\nimport torch\n", f"\nimport torch\n\n{line}", 1)


def package_init() -> str:
    tree = ast.parse((ROOT / "dmax_kernels" / "ops" / "__init__.py").read_text())
    (names,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    imported = "".join(f"    {name},\n" for name in names)
    public = "".join(f'    "{name}",\n' for name in [*names, "reference"])
    return (
        '"""Kernels for DMax (arXiv 2604.08302): parallel decoding of diffusion language models.\n'
        "\n"
        "The meaning of every op in plain PyTorch is in the submodule ``reference``.\n"
        '"""\n\n'
        "from . import reference\n"
        "from ._cuda_slots import fill_cuda_slots\n"
        f"from .ops import (\n{imported})\n\n"
        "_cuda_slots = fill_cuda_slots()  # the registrations live as long as this object\n\n"
        f"__all__ = [\n{public}]\n"
    )


def write_python(output: Path) -> None:
    package = ROOT / "dmax_kernels"
    files = [package / "reduction.py"]
    for folder in ("ops", "reference", "triton"):
        files += sorted((package / folder).glob("*.py"))
    for path in files:
        module = path.relative_to(package)
        write(output / PACKAGE / module, namespaced(relative_imports(path.read_text(), module)))
    write(output / PACKAGE / "__init__.py", package_init())


# ---- The whole ----


def write_layout(output: Path, repo_id: str) -> None:
    shutil.rmtree(output, ignore_errors=True)
    for path in sorted(FIXED.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            text = path.read_text().replace("@REPO_ID@", repo_id)
            write(output / path.relative_to(FIXED), text)
    sections = write_cxx(output)
    write_python(output)
    shutil.copy(ROOT / "LICENSE", output / "LICENSE")
    general = (
        "# Written by release/hub.py of dmax_kernels\n"
        f'[general]\nname = "dmax-kernels"\nversion = {KERNEL_VERSION}\nedition = 5\n'
        'license = "Apache-2.0"\nbackends = ["cpu", "cuda"]\n\n'
        f'[general.hub]\nrepo-id = "{repo_id}"\n\n'
        # sm_100 needs it, and no older one was tried
        '[general.cuda]\nminver = "12.8"\n\n'
    )
    write(output / "build.toml", general + sections)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "hub", help="(build/hub)")
    parser.add_argument(
        "--repo-id",
        default="your-name/dmax-kernels",
        help="the Hub repository it is for, named in build.toml and tests (%(default)s)",
    )
    options = parser.parse_args()
    write_layout(options.output, options.repo_id)
    files = sum(path.is_file() for path in options.output.rglob("*"))
    print(f"{options.output}: {files} files; build them with Hugging Face's kernel-builder")


if __name__ == "__main__":
    main()
