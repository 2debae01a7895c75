"""Compiles every Triton kernel for one GPU, without a GPU: `python triton_compile.py sm_90`.

Runs the ops' own host code on CPU tensors, with a driver that reports the requested GPU and with
every launch turned into a compilation: the kernels inspected are those that a user's call launches.
Prints one JSON object: kernel -> registers, stack, shared memory, 16-byte loads, matrix
instructions.
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
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from dmax_kernels.triton import IMPLEMENTATIONS as OPS

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
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
        raise AssertionError("nothing runs here, so nothing can be timed")

    def get_device_interface(self):
        raise AssertionError("nothing runs here, so there is no device to ask")


def inspect(kernel: CompiledKernel) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(CUOBJDUMP), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text))
    ptx = kernel.asm["ptx"]
    return {
        "registers": int(usage["REG"]),
        "stack": int(usage["STACK"]) + int(usage["LOCAL"]),  # spills are in the stack frame
        "shared": kernel.metadata.shared,
        "wide_loads": len(
            re.findall(r"ld\.global[.\w]*\.v4\.b32|cp\.async[.\w]* .*, (?:0x)?10", ptx)
        ),
        "tensor_core": len(re.findall(r"(?:wgmma\.mma_async|tcgen05\.mma|mma\.sync)", ptx)),
    }


def spd_step(top_k, mask_token_id=5, tau_dec=0.5, tau_acc=0.9, suppress_token=-1) -> None:
    editable = torch.empty(1, K, dtype=torch.bool)
    OPS["spd_step_"](
        torch.empty(1, K, 64, dtype=torch.bfloat16), torch.empty(64, D, dtype=torch.bfloat16),
        editable, editable.clone(), torch.zeros(1, K, dtype=torch.int64), torch.empty(1, K),
        torch.zeros(1, dtype=torch.bool), torch.zeros(1, dtype=torch.int32),
        torch.empty(1, K, D, dtype=torch.bfloat16), mask_token_id, tau_dec, tau_acc,
        top_k=top_k, suppress_token=suppress_token,
    )  # fmt: skip


def edit_step(rule, mask_token_id=5, threshold=0.5, steps=1, suppress_token=-1) -> None:
    editable = torch.empty(1, K, dtype=torch.bool)
    token = torch.zeros(1, K, dtype=torch.int64)
    OPS["edit_step_"](
        torch.empty(1, K, 64, dtype=torch.bfloat16), editable, token, token.clone(),
        torch.empty(1, K), torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.bool),
        mask_token_id, threshold, threshold, rule=rule, tokens_per_step=steps,
        max_post_edit_steps=steps, suppress_token=suppress_token,
    )  # fmt: skip


def call_every_op() -> None:
    """The sizes of LLaDA-2.0-mini in bfloat16; the two dtypes of the plain reads in float32 too."""

    def logits(dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(ROWS, V, dtype=dtype)

    for dtype in (torch.bfloat16, torch.float32):
        OPS["top1_confidence"](logits(dtype))
        OPS["row_statistics"](logits(dtype))
        OPS["token_logprobs"](logits(dtype), torch.zeros(ROWS, 1, dtype=torch.int64))
        call_with_a_mask(logits(dtype))
    OPS["row_statistics"](logits(), temperatures=torch.ones(ROWS))
    OPS["topk_confidence"](logits(), 8)
    OPS["top1_partial"](logits(), 0)
    OPS["sample_tokens"](logits(), torch.zeros(2, dtype=torch.int64))
    shards = torch.empty(8, ROWS)
    OPS["top1_merge"](shards, shards, shards.long())
    OPS["sample_partial"](logits(), torch.zeros(2, dtype=torch.int64), 64)
    for dtype in (torch.bfloat16, torch.float32):
        call_filters(logits(dtype))
    OPS["sample_merge"](shards, shards, shards.long(), shards, shards)
    for dtype in (torch.bfloat16, torch.float32):
        transform(logits(dtype))
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
        spd_step(top_k)
    for rule in range(4):
        edit_step(rule)


def transform(logits: torch.Tensor, rows: int = 1, softcap: float = 30.0) -> None:
    """The form with everything, and that with penalties alone; an operand for `rows` rows each."""
    counts = torch.zeros(ROWS // rows, V, dtype=torch.int32)
    words = torch.zeros(ROWS // rows, V // 32, dtype=torch.int32)
    OPS["transform_logits_"](
        logits.view(-1, rows, V), softcap=softcap, bias=torch.zeros(ROWS // rows, V),
        output_counts=counts, prompt_tokens=words, penalties=torch.ones(ROWS // rows, 3),
    )  # fmt: skip
    OPS["transform_logits_"](
        logits.view(-1, rows, V), output_counts=counts, presence_penalty=softcap
    )


def call_with_a_mask(logits: torch.Tensor) -> None:
    allowed = torch.empty(ROWS, V // 32, dtype=torch.int32)
    OPS["top1_confidence"](logits, allowed=allowed)
    OPS["topk_confidence"](logits, 8, allowed=allowed)
    OPS["row_statistics"](logits, allowed=allowed)
    OPS["token_logprobs"](logits, torch.zeros(ROWS, 1, dtype=torch.int64), allowed=allowed)


def call_filters(logits: torch.Tensor) -> None:
    """The one kernel for all filters, and its forms with a mask and with options per row."""
    seed = torch.zeros(2, dtype=torch.int64)
    allowed = torch.empty(ROWS, V // 32, dtype=torch.int32)
    row_options = torch.ones(ROWS, 4)
    OPS["sample_tokens"](logits, seed, top_k=20, top_p=0.9)
    OPS["sample_tokens"](logits, seed, row_options=row_options, allowed=allowed)


def call_linear_ops() -> None:
    """Every choice of tiles, over the vocabulary and the width of LLaDA-2.0-mini."""
    weight = torch.empty(V, D, dtype=torch.bfloat16)
    seed = torch.zeros(2, dtype=torch.int64)
    for rows in (16, 32, 64, 128, 1024):
        hidden = torch.empty(rows, D, dtype=torch.bfloat16)
        OPS["linear_top1_confidence"](hidden, weight)
        OPS["linear_sample_tokens"](hidden, weight, seed, weight[:, 0])
    OPS["linear_sample_tokens"](torch.empty(32, D), torch.empty(V, D), seed)
    OPS["linear_top1_confidence"](torch.empty(32, D), torch.empty(V, D))
    # The way by chunks of the vocabulary: the products run here, so they are small ones
    hidden, weight = torch.empty(64, 16), torch.empty(4000, 16)
    OPS["linear_top1_confidence"](hidden, weight)
    OPS["linear_top1_confidence"](hidden, weight, allowed=torch.empty(64, 125, dtype=torch.int32))
    OPS["linear_sample_tokens"](hidden, weight, seed, weight[:, 0])
    OPS["linear_sample_tokens"](hidden, weight, seed, top_p=0.5)
    OPS["linear_token_logprobs"](hidden, weight, torch.zeros(64, dtype=torch.int64), top_n=2)
    # Few rows, and the many that a training step has
    call_linear_loss(16, with_bias=False)
    call_linear_loss(128, with_bias=False)
    call_linear_loss(128, with_bias=True, label_smoothing=0.1)
    call_linear_loss_sum(64, 4000)


def call_soft_embedding() -> None:
    """Every choice of tiles, and both outputs."""
    for dtype in (torch.bfloat16, torch.float32):
        embedding = torch.empty(V, D, dtype=dtype)
        for rows in (16, 32, 64, 256):
            OPS["soft_embedding"](torch.empty(rows, V), embedding)
    OPS["soft_embedding"](
        torch.empty(256, V, dtype=torch.bfloat16), embedding, temperatures=torch.empty(256)
    )
    for rows in (32, 256):  # one pass, and by products
        cut = {"least": torch.empty(rows), "last_id": torch.empty(rows, dtype=torch.int64)}
        x = torch.empty(rows, V, dtype=torch.bfloat16)
        OPS["soft_embedding"](x, embedding.bfloat16(), **cut)
        OPS["soft_embedding"](x, embedding, temperatures=torch.empty(rows), **cut)
    OPS["top_p_cut"](torch.empty(32, V, dtype=torch.bfloat16), 0.9)
    OPS["top_p_cut"](torch.empty(32, V), 0.9, temperatures=torch.empty(32))
    OPS["soft_embedding_partial"](torch.empty(32, V), embedding)


def call_linear_loss(rows: int, with_bias: bool, **options) -> None:
    """Both passes; in the backward pass only our kernel, since products would run here."""
    hidden, weight = torch.empty(rows, D).bfloat16(), torch.empty(V, D, dtype=torch.bfloat16)
    target = torch.zeros(rows, dtype=torch.int64)
    bias = weight[:, 0] if with_bias else None
    losses = OPS["linear_oput_loss"](hidden, hidden, weight, target, bias, **options)
    OPS["linear_oput_loss_backward"](
        *losses[:2], hidden, hidden, weight, target, *losses[2:], bias, **options,
        needs_masked=False, needs_predicted=False, needs_weight=False, needs_bias=False,
    )  # fmt: skip


def call_linear_loss_sum(rows: int, vocab: int) -> None:
    """The kernels that read stored logits; the products run here, so they are small ones."""
    hidden, weight = torch.empty(rows, 16).bfloat16(), torch.empty(vocab, 16).bfloat16()
    target = torch.zeros(rows, dtype=torch.int64)
    OPS["linear_oput_loss_sum"](hidden, None, weight, target, label_smoothing=0.1)
    OPS["linear_oput_loss_scale_"](weight, torch.ones(()))


def call_with_other_values() -> None:
    """Run-time values for which Triton would recompile a kernel unless told not to: 1, 16,
    others."""
    logits, hidden = torch.empty(ROWS, V, dtype=torch.bfloat16), torch.empty(32, D)
    confidence, masked = torch.empty(ROWS, K), torch.empty(ROWS, K, dtype=torch.bool)
    embedding = torch.empty(64, D, dtype=torch.bfloat16)
    position = (embedding, torch.zeros(K, dtype=torch.int64), confidence[0], masked[0])
    target = torch.zeros(ROWS, dtype=torch.int64)
    for value in (0, 1, 16, 37):
        options = {"temperature": 0.5 + value, "suppress_token": value}
        OPS["top1_confidence"](logits, **options)
        OPS["top1_confidence"](logits[: value + 1], **options)
        OPS["topk_confidence"](logits, 8, **options)
        OPS["token_logprobs"](logits, target, temperature=0.5 + value, ignore_index=value)
        OPS["row_statistics"](logits, **options)
        OPS["row_statistics"](logits[: value + 1], **options)
        OPS["top1_partial"](logits, value, **options)
        OPS["sample_tokens"](logits, torch.zeros(2, dtype=torch.int64), **options)
        OPS["sample_partial"](logits, torch.zeros(2, dtype=torch.int64), 64 * value, **options)
        seed = torch.zeros(2, dtype=torch.int64)
        OPS["sample_tokens"](logits, seed, top_k=value + 1, min_p=1 / (value + 2), **options)
        OPS["linear_sample_tokens"](
            torch.empty(80 + value, 16), torch.empty(4000, 16), seed, top_p=0.5
        )
        transform(logits, max(value % 32, 1) if value != 37 else 2, 1.0 + value)
        OPS["prefix_promote"](confidence, masked, value)
        OPS["hybrid_embedding"](*position, value)
        OPS["hybrid_embedding_backward"](torch.empty(K, D, dtype=torch.bfloat16), *position, value)
        losses = {"ignore_index": value, "label_smoothing": 1 / (value + 2), "z_loss": value}
        OPS["oput_loss"](logits, None, target, **losses)
        OPS["linear_top1_confidence"](hidden, torch.empty(V, D), **options)
        OPS["soft_embedding"](
            torch.empty(64 - value, V), torch.empty(V, D).bfloat16(), temperature=value + 0.5
        )
        OPS["top_p_cut"](logits, 1 / (value + 2), temperature=value + 0.5)
        call_linear_loss(128 + value, with_bias=True, **losses)
        call_linear_loss_sum(value + 1, 4000)
        OPS["linear_top1_confidence"](torch.empty(64 + value, 16), torch.empty(4000, 16), **options)
        spd_step(1, mask_token_id=value, tau_dec=float(value), tau_acc=value, suppress_token=value)
        edit_step(2, value, float(value), steps=value + 1, suppress_token=value)


def main(capability: int) -> dict[str, object]:
    driver.set_active(CompileOnlyDriver(capability))
    kernels: dict[str, dict[str, int]] = {}
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            name, number = self.fn.__name__, 1
            while name in kernels:
                number += 1
                name = f"{self.fn.__name__}#{number}"
            kernels[name] = inspect(kernel)
        return kernel

    seen: set[str] = set()
    JITFunction.run = compile_only
    call_every_op()
    call_linear_ops()
    call_soft_embedding()
    before = set(kernels)
    call_with_other_values()
    return {"kernels": kernels, "recompiled": sorted(set(kernels) - before)}


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1].removeprefix("sm_"))), indent=1))
