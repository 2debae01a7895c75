"""The CPU ops under each instruction set below this machine's: the tests of their values again.

The choice is made once per process, by ATEN_CPU_CAPABILITY, so each runs in a Python of its own.
pytest's last lines say which instruction sets ran.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import dmax_kernels

HERE = Path(__file__).parent
# Capability -> what the library then runs, in ascending order. Above these, no capability but this
# machine's own: "avx512, bf16" or "avx512, amx", which add a bfloat16 product.
SETS = {"default": "portable", "avx2": "avx2", "avx512": "avx512"}
OWN = dmax_kernels.libraries.instruction_set()
LOWER = list(SETS.items())[: list(SETS.values()).index(OWN) if OWN in SETS.values() else None]
# The families whose CPU kernels differ between instruction sets: all but promotion
FAMILIES = (
    "top1",
    "statistics",
    "logprobs",
    "sample",
    "transform",
    "embedding",
    "spd_step",
    "edit_step",
    "loss",
    "linear_rows",
)
MORE = ("linear_loss", "sample_options", "soft_embedding", "statistics_temperatures")
FILES = [HERE / f"test_{family}.py" for family in (*FAMILIES, *MORE)]
# What no instruction set changes, or what takes long; one op at the large vocabularies is enough
LEFT_OUT = "reference or triton or cuda or simt or compile or memory or gradcheck"
LEFT_OUT += " or distribution or law or stored_logits"
CHOSEN = f"not ({LEFT_OUT}) and not (large_vocabulary and not test_top1_large_vocabulary)"


@pytest.mark.skipif(not LOWER, reason="the portable kernels are all that this machine runs")
@pytest.mark.parametrize(("capability", "name"), LOWER, ids=[name for _, name in LOWER])
def test_cpu_ops(capability, name):
    options = ("-p", "no:xdist", "-p", "no:cacheprovider", "-k", CHOSEN)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *map(str, sorted(FILES))],
        env=os.environ | {"ATEN_CPU_CAPABILITY": capability},
        cwd=HERE.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]
    assert f"instruction sets of the CPU that ran: {name}\n" in done.stdout
