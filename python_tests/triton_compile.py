"""Compiles every Triton kernel for one GPU, without a GPU: `python triton_compile.py sm_90`.

Runs the ops' own host code on CPU tensors, with a driver that names the wanted GPU and with every
launch turned into a compilation, so that what is inspected is what a user's call launches. Prints
one JSON object: kernel -> registers, stack, shared, spills and widest global load in bytes.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from dmax_kernels.triton import IMPLEMENTATIONS as OPS

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
V, D, K, ROWS = 157184, 2048, 32, 32


class CompileOnlyDriver(DriverBase):
    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_benchmarker(self):
        raise NotImplementedError

    def get_device_interface(self):
        raise NotImplementedError


def inspect(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def cuobjdump(flag: str) -> str:
            tool = str(TOOLS / "cuobjdump")
            return subprocess.run(
                [tool, flag, file.name], capture_output=True, text=True, check=True
            ).stdout

        usage = dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", cuobjdump("-res-usage")))
        sass = cuobjdump("-sass")
    widths = [
        int(bits or 32) // 8
        for bits in re.findall(r"\bLDG\.E(?:\.\w+)*?(?:\.(64|128))?(?:\.\w+)* ", sass)
    ]
    return {
        "registers": int(usage["REG"]),
        "stack": int(usage["STACK"]),
        "local": int(usage["LOCAL"]),
        "shared": int(usage["SHARED"]),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "widest_load": 16 if re.search(r"LDG\.E[.\w]*\.128", sass) else max(widths, default=0),
        "tensor_core": len(re.findall(r"\b(?:HMMA|HGMMA|UTCHMMA)\b", sass)),
    }


def call_every_op() -> None:
    """The sizes of LLaDA-2.0-mini in bfloat16; the two dtypes of the plain reads in float32 too."""

    def logits(dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(ROWS, V, dtype=dtype)

    for dtype in (torch.bfloat16, torch.float32):
        OPS["top1_confidence"](logits(dtype))
    OPS["topk_confidence"](logits(), 8)
    OPS["top1_partial"](logits(), 0)
    OPS["sample_tokens"](logits(), torch.zeros(2, dtype=torch.int64))
    shards = torch.empty(8, ROWS)
    OPS["top1_merge"](shards, shards, shards.long())
    confidence, masked = torch.empty(ROWS, K), torch.empty(ROWS, K, dtype=torch.bool)
    OPS["prefix_promote"](confidence, masked, 0.9)

    embedding = torch.empty(64, D, dtype=torch.bfloat16)
    token = torch.zeros(K, dtype=torch.int64)
    hybrid = (embedding, token, confidence[0], masked[0], 5)
    OPS["hybrid_embedding"](*hybrid)
    OPS["hybrid_embedding_backward"](torch.empty(K, D, dtype=torch.bfloat16), *hybrid)

    target = torch.zeros(ROWS, dtype=torch.int64)
    for smoothing in (0.0, 0.1):
        OPS["oput_loss"](logits(), None, target, label_smoothing=smoothing)
    OPS["oput_loss_backward"](torch.empty(ROWS), logits(), target, torch.empty(ROWS))
    OPS["oput_loss_and_grad_"](logits(), None, target)

    for top_k in (1, 4):
        OPS["spd_step_"](
            torch.empty(1, K, 64, dtype=torch.bfloat16), embedding, masked[:1], masked[:1].clone(),
            token[None], confidence[:1], masked[:1, 0].contiguous(),
            torch.zeros(1, dtype=torch.int32), torch.empty(1, K, D, dtype=torch.bfloat16),
            5, 0.5, 0.9, top_k=top_k,
        )  # fmt: skip


def main(capability: int) -> dict[str, dict[str, int]]:
    driver.set_active(CompileOnlyDriver(capability))
    report: dict[str, dict[str, int]] = {}
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        key = kernel.hash
        if key not in seen:
            seen.add(key)
            name, number = self.fn.__name__, 1
            while name in report:
                number += 1
                name = f"{self.fn.__name__}#{number}"
            report[name] = inspect(kernel.asm["cubin"])
        return kernel

    seen: set[str] = set()
    JITFunction.run = compile_only
    call_every_op()
    return report


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1].removeprefix("sm_"))), indent=1))
