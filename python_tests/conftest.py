"""Where there is no GPU: Triton kernels run under Triton's interpreter, `gpu` tests are skipped."""

import os

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, so before any test module


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
