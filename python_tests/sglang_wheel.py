"""SGLang's own algorithm classes, from its wheel, without what else SGLang needs to be imported.

`make test-engines` unpacks the wheel. The algorithms compute with torch alone. The modules from
which they take names for annotations need libraries of GPUs, and empty ones stand in for these.
"""

import importlib
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WHEEL = ROOT / "build/engines/sglang"
ALGORITHMS = "sglang.srt.dllm.algorithm"
NAMES_ONLY = {
    "sglang.srt.arg_groups.overrides": {"resolving_view": lambda server_args: server_args},
    "sglang.srt.configs.model_config": {"ModelConfig": object},
    "sglang.srt.layers.logits_processor": {"LogitsProcessorOutput": object},
    "sglang.srt.model_executor.forward_batch_info": {"ForwardBatch": object},
    "sglang.srt.model_executor.model_runner": {"ModelRunner": object},
    "sglang.srt.server_args": {"ServerArgs": object},
    "sglang.srt.utils": {"is_npu": lambda: False},
}


def sglang_wheel():
    """Make the wheel's `sglang` importable in this process, or skip."""
    if not (WHEEL / "sglang").is_dir():
        pytest.skip("SGLang's wheel is not unpacked here: `make test-engines` does it")
    for name in ("sglang", "sglang.srt"):  # without their __init__, which imports the server
        package = types.ModuleType(name)
        package.__path__ = [str(WHEEL.joinpath(*name.split(".")))]
        sys.modules.setdefault(name, package)
    for name, contents in NAMES_ONLY.items():
        module = types.ModuleType(name)
        vars(module).update(contents)
        sys.modules.setdefault(name, module)
    return importlib.import_module(ALGORITHMS)
