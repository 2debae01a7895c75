"""How much faster the fused step after a forward pass is, at the sizes of LLaDA-2.0-mini."""

from __future__ import annotations

import statistics
import time

import torch

import dmax_kernels
from dmax_kernels import reference
from dmax_kernels.decoding import BlockState

VOCABULARY, HIDDEN, BLOCK, MASK = 157_184, 2048, 32, 156_895


def step_speedup(dtype: torch.dtype, repeats: int = 5) -> float:
    """Median time of the reference step over that of the fused `spd_step_`: one block, 32 rows.

    Both are timed in turns in one process, on the same logits, so that whatever else the machine
    does falls on both.
    """
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, BLOCK, VOCABULARY, generator=generator, dtype=torch.float32)
    likely = torch.randint(0, VOCABULARY, (1, BLOCK, 1), generator=generator)
    # A trained model's rows are peaked: 20 above the noise is a confidence close to 1
    logits.scatter_(-1, likely, 20.0)
    logits = logits.to(dtype)
    # Only rows that a step can read need values: the others would cost a gigabyte to fill
    embedding = torch.zeros(VOCABULARY, HIDDEN, dtype=dtype)
    for row in (*likely.flatten().tolist(), MASK):
        embedding[row] = torch.randn(HIDDEN, generator=generator, dtype=torch.float32).to(dtype)

    tokens = torch.zeros(1, BLOCK, dtype=torch.int64)
    times: dict[str, list[float]] = {"reference": [], "fused": []}
    for repeat in range(repeats + 1):
        for name, ops in (("reference", reference), ("fused", dmax_kernels)):
            state = BlockState.fully_masked(tokens, 0, embedding, MASK)
            begin = time.perf_counter()
            ops.spd_step_(
                logits,
                embedding,
                **vars(state),
                mask_token_id=MASK,
                tau_dec=0.5,
                tau_acc=0.9,
                suppress_token=MASK,
            )
            if repeat > 0:  # the first round warms both up
                times[name].append(time.perf_counter() - begin)
    return statistics.median(times["reference"]) / statistics.median(times["fused"])
