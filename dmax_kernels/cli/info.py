"""``python -m dmax_kernels info``: what is installed, and which backend serves which op."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform

import torch

import dmax_kernels
from dmax_kernels import libraries


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")


def backends() -> dict[str, dict[str, str]]:
    """op -> {"cpu": backend, "cuda": backend}, as PyTorch's dispatcher sees them."""

    def backend(op: str, key: str) -> str:
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"dmax::{op}", key):
            return "-"
        if key == "CPU":
            return "c++"
        return "triton" if op in libraries.triton_ops else "c++"

    # Only names that the dispatcher knows: a public function may combine several
    names = sorted(
        schema.name.removeprefix("dmax::")
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("dmax::") and not schema.name.startswith("dmax::_")
    )
    return {op: {"cpu": backend(op, "CPU"), "cuda": backend(op, "CUDA")} for op in names}


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def triton_state() -> str:
    if libraries.triton_ops:
        return f"serve {len(libraries.triton_ops)} ops on CUDA devices"
    return libraries.triton_reason or "not needed: the CUDA library serves every op"


def cuda_build() -> dict:
    """What the CUDA library was built for and with; for each kernel, its most demanding build."""
    report = libraries.cuda_report()
    if report is None:
        return {}
    kernels: dict[str, dict[str, int]] = {}
    for entry in report["kernels"]:
        name = entry["kernel"].split("<")[0].removesuffix("_kernel")
        most = kernels.setdefault(name, {"registers": 0, "shared_bytes": 0, "spill_bytes": 0})
        for key in most:
            most[key] = max(most[key], entry[key])
    return {
        "CUDA architectures": " ".join(f"sm_{each}" for each in report["architectures"]),
        "CUDA compiler": f"{report['compiler']}, for torch {report['torch_target']} and newer",
        "CUDA kernels": kernels,
    }


def collect() -> dict:
    gpu = "none"
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        gpu = f"{torch.cuda.get_device_name()} (sm_{major}{minor})"
    return {
        "dmax_kernels": dmax_kernels.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch CUDA": torch.version.cuda or "none",
        "triton": version("triton"),
        "transformers": version("transformers"),
        "GPU": gpu,
        "CPU instruction set": libraries.instruction_set(),
        "CPU threads": torch.get_num_threads(),
        "CPU library": str(libraries.cpu),
        "CUDA library": str(libraries.cuda or libraries.cuda_reason),
        **cuda_build(),
        "Triton kernels": triton_state(),
        "backends": backends(),
    }


def run(options: argparse.Namespace) -> int:
    facts = collect()
    if options.json:
        print(json.dumps(facts, indent=2))
        return 0
    table = facts.pop("backends")
    kernels = facts.pop("CUDA kernels", {})
    width = max(map(len, facts))
    for name, fact in facts.items():
        print(f"{name:<{width}}  {fact}")
    width = max(map(len, table))
    print(f"\n{'op':<{width}}  cpu     cuda")
    for op, by_device in table.items():
        print(f"{op:<{width}}  {by_device['cpu']:<6}  {by_device['cuda']}")
    if kernels:
        width = max(map(len, kernels))
        print(f"\n{'CUDA kernel':<{width}}  registers  static shared  spilled")
        for name, most in sorted(kernels.items()):
            registers, shared, spilled = most.values()
            print(f"{name:<{width}}  {registers:>9}  {shared:>11} B  {spilled:>5} B")
    return 0
