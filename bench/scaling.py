"""How cost grows: time against rows and against the vocabulary, ours and eager's."""

from __future__ import annotations

from tqdm import tqdm

from dmax_kernels.bench.measure import Machine, measure
from dmax_kernels.bench.workload import DTYPES, WORKLOADS, Inputs

# op, which size grows, its values, the others: powers of 4 around LLaDA-2.0-mini's shapes
SERIES = (
    ("top1_confidence", "rows", (1, 4, 16, 64, 256), lambda rows: (rows, 157184)),
    ("top1_confidence", "vocab", (2048, 8192, 32768, 131072, 524288), lambda vocab: (32, vocab)),
    ("spd_step_", "batch", (1, 2, 4, 8), lambda batch: (batch, 32, 157184, 256)),
    ("oput_loss", "tokens", (4, 16, 64), lambda tokens: (tokens, 157184)),
)


def run_scaling(machine: Machine, repetitions: int = 7) -> list[dict]:
    rows = []
    for op, axis, values, sizes_of in tqdm(SERIES, desc="scaling", disable=None):
        series = {"op": op, "axis": axis, "points": []}
        for value in values:
            inputs = Inputs(DTYPES["bfloat16"], machine.device, "flat")
            work = WORKLOADS[op].work(inputs, sizes_of(value))
            result = measure(work, machine, repetitions=repetitions)
            times = {name: row["us"] for name, row in result["candidates"].items()}
            series["points"].append({axis: value, **times})
        rows.append(series)
    return rows
