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
        if schema.name.startswith("dmax::")
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
        "Triton kernels": triton_state(),
        "backends": backends(),
    }


def run(options: argparse.Namespace) -> int:
    facts = collect()
    if options.json:
        print(json.dumps(facts, indent=2))
        return 0
    table = facts.pop("backends")
    width = max(map(len, facts))
    for name, fact in facts.items():
        print(f"{name:<{width}}  {fact}")
    width = max(map(len, table))
    print(f"\n{'op':<{width}}  cpu     cuda")
    for op, by_device in table.items():
        print(f"{op:<{width}}  {by_device['cpu']:<6}  {by_device['cuda']}")
    return 0
