"""QuACK's row kernels, compiled ahead of time: its compiler does not travel (240 MB).

``bench/carry_peers.py`` runs ``main`` where that compiler and no GPU are: QuACK compiles its own
kernels, one per element type and vocabulary, and each becomes a library beside a copy of this file,
the package ``quack_ahead``. Imported, it calls them with the arguments of QuACK's own functions of
these names (quack/softmax.py, quack/cross_entropy.py of 0.6.5).
"""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path

import torch

IGNORED = -100
# An error's path through CUTLASS's runtime library (44 MB), which is all that the kernels use of it
ERROR_PATH = r"""
#include <stdint.h>
#include <stdio.h>
void CuteDSLRT_TVMFFISetRaisedCudaError(
    void (*raise)(const char*, const char**, int32_t), int32_t code) {
  char text[32];
  snprintf(text, sizeof text, "CUDA error %d", code);
  const char* parts[] = {text};
  raise("RuntimeError", parts, 1);
}
"""


@functools.cache
def kernel(name: str, dtype: torch.dtype, vocab: int):
    import tvm_ffi

    path = Path(__file__).parent / file_name(name, dtype, vocab)
    if not path.exists():
        raise ValueError(f"{name} was not compiled for {vocab} columns of {dtype}")
    return tvm_ffi.load_module(str(path))["func"]


def file_name(name: str, dtype: torch.dtype, vocab: int) -> str:
    return f"{name}-{str(dtype).removeprefix('torch.')}-{vocab}.so"


def softmax(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    kernel("softmax", x.dtype, x.shape[1])(x, out)
    return out


def row_losses(x: torch.Tensor) -> torch.Tensor:
    return torch.empty(len(x), dtype=torch.float32, device=x.device)


def cross_entropy_fwd(x, target, return_dx: bool, inplace_backward: bool):
    """The losses, and their gradients over the logits."""
    assert return_dx
    assert inplace_backward
    loss = row_losses(x)
    kernel("loss_and_dx", x.dtype, x.shape[1])(x, target, None, loss, None, x, None, IGNORED)
    return loss, x


class CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, target):
        loss, lse = row_losses(x), row_losses(x)
        forward = kernel("loss_and_lse", x.dtype, x.shape[1])
        forward(x, target, None, loss, lse, None, None, IGNORED)
        ctx.save_for_backward(x, target, lse)
        return loss

    @staticmethod
    def backward(ctx, grad):
        x, target, lse = ctx.saved_tensors
        dx = torch.empty_like(x)
        kernel("dx", x.dtype, x.shape[1])(x, target, grad, dx, lse, None, IGNORED)
        return dx, None


def cross_entropy(x, target):
    return CrossEntropy.apply(x, target).sum() / (target != IGNORED).sum().float()


def compile_all(folder: Path, shapes: list[tuple[torch.dtype, int]]) -> None:
    """Exports every kernel, as QuACK's own cache on disk does, and links it."""
    import nvidia_cutlass_dsl
    import tvm_ffi
    from quack.cross_entropy import CrossEntropy, CrossEntropyBackward
    from quack.cute_dsl_utils import torch2cute_dtype_map
    from quack.softmax import Softmax

    runtime = next(Path(nvidia_cutlass_dsl.__path__[0]).rglob("libcuda_dialect_runtime_static.a"))
    ids = torch2cute_dtype_map[torch.int64]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "error_path.c").write_text(ERROR_PATH)
    for dtype, vocab in shapes:
        of = torch2cute_dtype_map[dtype]
        compiled = {
            "softmax": Softmax.compile(of, of, vocab),
            "loss_and_lse": CrossEntropy.compile(of, ids, None, vocab, True, False, None, None),
            "loss_and_dx": CrossEntropy.compile(of, ids, None, vocab, False, True, None, None),
            "dx": CrossEntropyBackward.compile(of, ids, vocab, None),
        }
        for name, function in compiled.items():
            library = folder / file_name(name, dtype, vocab)
            unlinked = library.with_suffix(".o")
            function.export_to_c(object_file_path=str(unlinked), function_name="func")
            tvm = Path(tvm_ffi.__file__).parent / "lib"
            subprocess.run(
                ["gcc", "-shared", "-fPIC", "-O2", "-o", library, folder / "error_path.c", unlinked,
                 runtime, "-L/usr/local/cuda/lib64", "-lcudart", f"-L{tvm}", "-ltvm_ffi"],
                check=True,
            )  # fmt: skip
            unlinked.unlink()
    (folder / "error_path.c").unlink()
    (folder / "__init__.py").write_text(Path(__file__).read_text())


if __name__ == "__main__":
    compile_all(Path(sys.argv[1]), [(torch.bfloat16, 157184), (torch.float32, 157184)])
