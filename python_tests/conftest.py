"""Where there is no GPU: Triton kernels run under Triton's interpreter, `gpu` tests are skipped."""

import importlib.metadata
import os

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, so before any test module


def pytest_configure(config):
    """Triton 3.6's interpreter turns one-element arrays into Python ints, which numpy 2.4 made an
    error (triton-lang/triton issue 9171; 3.7 squeezes them): said once, not by every test."""
    if HAS_GPU:
        return
    triton, numpy = (version_of(package) for package in ("triton", "numpy"))
    if triton and (3, 0) <= triton < (3, 7) and numpy >= (2, 4):
        raise pytest.UsageError(
            f"Triton {triton[0]}.{triton[1]}'s interpreter does not run with numpy "
            f"{numpy[0]}.{numpy[1]}: install triton>=3.7 or numpy<2.4"
        )


def version_of(package):
    """(major, minor), or () where it is not installed."""
    try:
        return tuple(map(int, importlib.metadata.version(package).split(".")[:2]))
    except importlib.metadata.PackageNotFoundError:
        return ()


def pytest_collection_modifyitems(config, items):
    if not config.getoption("-m"):  # minutes long: only when asked for
        slow = pytest.mark.skip(reason="slow: run with -m slow")
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(slow)
    if HAS_GPU:
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU (make gpu)")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
