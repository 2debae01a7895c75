"""Calls with few rows of many logits, whose tiles the threads share: the bits of any number of
threads, and one parallel region per call."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dmax_kernels as dk

SEED = torch.tensor([3, 11])
VOCAB = 400_001  # three rows are more than 2^20 logits; not a multiple of a tile
OPS = {
    "top1_confidence": lambda x, ids: dk.top1_confidence(x),
    "topk_confidence": lambda x, ids: dk.topk_confidence(x, 4, suppress_token=7),
    "row_statistics": lambda x, ids: dk.row_statistics(x, temperature=0.7),
    "token_logprobs": lambda x, ids: dk.token_logprobs(x, ids, top_n=5),
    "oput_loss": lambda x, ids: dk.oput_loss(x, x.flip(0), ids, label_smoothing=0.1),
    "sample_tokens": lambda x, ids: dk.sample_tokens(x, SEED.expand(len(x), 2)),
    "sample_filtered": lambda x, ids: dk.sample_tokens(
        x, SEED.expand(len(x), 2), temperature=0.8, top_k=5000, top_p=0.9),
}  # fmt: skip

# Counts the parallel regions: the library reaches at::parallel_for through this C function
COUNTER = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
typedef void (*Body)(int64_t, int64_t, void*);
static int64_t calls;
int64_t regions(void) { return calls; }
int32_t torch_parallel_for(int64_t begin, int64_t end, int64_t grain, Body body, void* context) {
  static int32_t (*of_torch)(int64_t, int64_t, int64_t, Body, void*);
  if (!of_torch)
    of_torch = dlsym(dlopen("libtorch_cpu.so", RTLD_NOLOAD | RTLD_LAZY), "torch_parallel_for");
  ++calls;
  return of_torch(begin, end, grain, body, context);
}
"""


def rows_and_ids(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    x = 2 * torch.randn(count, VOCAB, generator=generator)
    x[0, 5] = 40.0  # most of the row's tiles lie too deep to count
    x[1, 9] = x[1, VOCAB - 1] = 9.0  # a tie of the first and the last tile
    if count > 3:
        x[2, 300_000] = float("nan")
        x[3] = -float("inf")
    return x.bfloat16(), torch.randint(VOCAB, (count,), generator=generator)


def results(op: str, x: torch.Tensor, ids: torch.Tensor) -> list[torch.Tensor]:
    return [t for t in OPS[op](x, ids) if t is not None]


def equal_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    def bits(t):
        return t.contiguous().view(torch.uint8)

    return torch.equal(bits(a), bits(b))


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("op", OPS)
def test_bits_do_not_depend_on_the_threads(op, threads):
    for count in (3, 5):
        x, ids = rows_and_ids(count)
        threads(1)  # takes whole rows
        expected = results(op, x, ids)
        for number in (2, 3, 4):
            threads(number)
            for _ in range(2):
                found = results(op, x, ids)
                assert all(map(equal_bits, found, expected)), (op, count, number)


def count_regions():
    """A process with the counter: prints op and regions of one call."""
    import ctypes

    counter = ctypes.CDLL(os.environ["LD_PRELOAD"])
    counter.regions.restype = ctypes.c_int64
    torch.set_num_threads(4)
    x, ids = rows_and_ids(3)
    for op in OPS:
        before = counter.regions()
        results(op, x, ids)
        print(op, counter.regions() - before)


@pytest.mark.skipif(sys.platform != "linux", reason="preloads a library")
@pytest.mark.skipif(shutil.which("cc") is None, reason="compiles a library")
def test_a_call_is_one_parallel_region(tmp_path: Path):
    source, library = tmp_path / "counter.c", tmp_path / "counter.so"
    source.write_text(COUNTER)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    child = subprocess.run(
        [sys.executable, __file__], capture_output=True, text=True, check=True,
        env={**os.environ, "LD_PRELOAD": str(library), "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert dict(line.split() for line in child.stdout.splitlines()) == dict.fromkeys(OPS, "1")


if __name__ == "__main__":
    count_regions()
