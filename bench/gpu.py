"""GPU timings of the ops beside eager PyTorch and torch.compile: graph replays, cold L2, median.

``python bench/gpu_session.py`` runs this after the tests. Cold: between timed replays a buffer
larger than the L2 is overwritten, outside the timed region. A share of bandwidth is of the copy
bandwidth measured in the same run, counting bytes read and written.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

import dmax_kernels
from bench.bench_row_statistics import eager as eager_statistics
from dmax_kernels import reference

VOCAB, DIM, MASK = 157184, 2048, 156895
FLUSH_BYTES = 512 << 20


@dataclass
class GpuCase:
    name: str
    candidates: dict[str, Callable[[], object]]  # "fused" is ours
    bytes_moved: int  # the fewest: each input read once, each output written once
    target_us: float | None = None  # design section 8, for the H200
    restore: Callable[[], object] | None = None  # untimed: what the candidates overwrite


def copy_bandwidth() -> float:
    """Bytes per second of a device-to-device copy of 2 GiB, read and written."""
    source = torch.empty(1 << 30, dtype=torch.int16, device="cuda").random_()
    target = torch.empty_like(source)
    seconds = timed(lambda: target.copy_(source), 20, flush=None)
    return 2 * source.nbytes / statistics.median(seconds)


def timed(
    run: Callable[[], object],
    repetitions: int,
    flush: torch.Tensor | None,
    restore: Callable[[], object] | None = None,
) -> list[float]:
    """Seconds of each repetition, by events around it."""
    seconds = []
    for _ in range(repetitions):
        if restore is not None:
            restore()
        if flush is not None:
            flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # keeps the GPU busy while the host queues both events, so that they bracket the work alone
        torch.cuda._sleep(200_000)
        start.record()
        run()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    return seconds


def captured(function: Callable[[], object]) -> Callable[[], object]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def random_logits(rows: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(rows)
    return (3 * torch.randn(rows, VOCAB, device="cuda", generator=generator)).to(dtype)


def softmax_max(logits):
    return torch.softmax(logits.float(), dim=-1).max(dim=-1)


def top1_case(rows: int, dtype: torch.dtype, target_us: float | None) -> GpuCase:
    logits = random_logits(rows, dtype)
    compiled = torch.compile(softmax_max)
    return GpuCase(
        f"top1_confidence {rows} x {VOCAB} {dtype}".replace("torch.", ""),
        {
            "eager": lambda: softmax_max(logits),
            "torch.compile": lambda: compiled(logits),
            "fused": lambda: dmax_kernels.top1_confidence(logits),
        },
        logits.nbytes,
        target_us,
    )


def sample_case(rows: int) -> GpuCase:
    logits = random_logits(rows, torch.bfloat16)
    seed = torch.tensor([1, 2], device="cuda")

    def eager():
        noise = torch.empty(logits.shape, device="cuda").exponential_()
        return (torch.softmax(logits.float(), dim=-1) / noise).argmax(dim=-1)

    return GpuCase(
        f"sample_tokens {rows} x {VOCAB} bfloat16",
        {"eager": eager, "fused": lambda: dmax_kernels.sample_tokens(logits, seed)},
        logits.nbytes,
    )


def topk_case(rows: int, k: int) -> GpuCase:
    logits = random_logits(rows, torch.bfloat16)
    return GpuCase(
        f"topk_confidence k={k} {rows} x {VOCAB} bfloat16",
        {
            "eager": lambda: torch.softmax(logits.float(), dim=-1).topk(k),
            "fused": lambda: dmax_kernels.topk_confidence(logits, k),
        },
        logits.nbytes,
    )


def statistics_case(rows: int) -> GpuCase:
    logits = random_logits(rows, torch.bfloat16)
    compiled = torch.compile(eager_statistics)
    return GpuCase(
        f"row_statistics {rows} x {VOCAB} bfloat16",
        {
            "eager": lambda: eager_statistics(logits),
            "torch.compile": lambda: compiled(logits),
            "fused": lambda: dmax_kernels.row_statistics(logits),
        },
        logits.nbytes,
    )


def spd_case(batch: int, block: int, target_us: float | None, top_k: int = 1) -> GpuCase:
    logits = random_logits(batch * block, torch.bfloat16).view(batch, block, VOCAB)
    embedding = torch.randn(VOCAB, DIM, device="cuda").bfloat16()
    state = {
        "masked": (torch.arange(block, device="cuda") >= block // 2).expand(batch, block),
        "token": torch.full((batch, block), MASK, device="cuda"),
        "confidence": torch.zeros(batch, block, device="cuda"),
        "converged": torch.zeros(batch, dtype=torch.bool, device="cuda"),
        "step": torch.ones(batch, dtype=torch.int32, device="cuda"),
        "inputs_embeds": torch.zeros(batch, block, DIM, dtype=torch.bfloat16, device="cuda"),
    }
    state = {name: tensor.clone() for name, tensor in state.items()}
    start = {name: tensor.clone() for name, tensor in state.items()}
    editable = torch.ones(batch, block, dtype=torch.bool, device="cuda")

    def restore():
        for name, tensor in start.items():
            state[name].copy_(tensor)

    def step(op):
        op(logits, embedding, editable=editable, **state, mask_token_id=MASK, tau_dec=0.5,
           tau_acc=0.9, top_k=top_k)  # fmt: skip

    return GpuCase(
        f"spd_step_ {batch} x {block} top_k={top_k} bfloat16",
        {
            "eager": lambda: step(reference.spd_step_),
            "fused": lambda: step(dmax_kernels.spd_step_),
        },
        logits.nbytes + 3 * batch * block * DIM * 2,
        target_us,
        restore,
    )


def promote_case() -> GpuCase:
    confidence = torch.rand(16, 32, device="cuda")
    masked = torch.rand(16, 32, device="cuda") < 0.7
    return GpuCase(
        "prefix_promote 16 x 32",
        {
            "eager": lambda: reference.prefix_promote(confidence, masked, 0.5),
            "fused": lambda: dmax_kernels.prefix_promote(confidence, masked, 0.5),
        },
        6 * confidence.numel(),
        2.5,
    )


def hybrid_case() -> GpuCase:
    embedding = torch.randn(VOCAB, DIM, device="cuda").bfloat16()
    token = torch.randint(0, VOCAB, (32,), device="cuda")
    confidence = torch.rand(32, device="cuda")
    masked = torch.arange(32, device="cuda") % 4 == 3
    arguments = (embedding, token, confidence, masked, MASK)
    return GpuCase(
        f"hybrid_embedding 32 x {DIM} bfloat16",
        {
            "eager": lambda: reference.hybrid_embedding(*arguments),
            "fused": lambda: dmax_kernels.hybrid_embedding(*arguments),
        },
        2 * 32 * DIM * 2,
        3.0,
    )


def loss_case(tokens: int, in_place: bool) -> GpuCase:
    logits = [random_logits(tokens, torch.bfloat16) for _ in range(2)]
    target = torch.randint(0, VOCAB, (tokens,), device="cuda")
    weight = torch.full((tokens,), 1 / tokens, device="cuda")

    def both_ways(loss_of):
        leaves = [x.detach().requires_grad_() for x in logits]
        loss = sum(loss_of(x).mean() for x in leaves)
        return torch.autograd.grad(loss, leaves)

    def eager_loss(x):
        return torch.nn.functional.cross_entropy(x.float(), target, reduction="none")

    def fused():
        if in_place:
            return dmax_kernels.oput_loss_and_grad_(*logits, target, weight, weight)
        leaves = [x.detach().requires_grad_() for x in logits]
        losses = dmax_kernels.oput_loss(*leaves, target)
        return torch.autograd.grad(sum(x.mean() for x in losses), leaves)

    compiled_loss = torch.compile(eager_loss)
    start = [x.clone() for x in logits] if in_place else []

    def restore():
        for x, values in zip(logits, start, strict=False):
            x.copy_(values)

    passes = 2 if in_place else 3  # read and write; the separate backward reads once more
    return GpuCase(
        f"oput_loss{'_and_grad_' if in_place else ' forward and backward'} 2 x {tokens} bfloat16",
        {
            "eager": lambda: both_ways(eager_loss),
            "torch.compile": lambda: both_ways(compiled_loss),
            "fused": fused,
        },
        passes * 2 * logits[0].nbytes,
        {(4096, False): 1700.0, (4096, True): 1200.0}.get((tokens, in_place)),
        restore,
    )


# Prediction of each "fused" time on an H200, written before any run: bytes over 4.3 TB/s, the copy
# bandwidth expected, plus 2 us of launch, plus 2 us where a second phase follows the stream
PREDICTED_US = {
    "top1_confidence 32": 6.0,
    "top1_confidence 256": 22.0,
    "top1_confidence 4096": 310.0,
    "sample_tokens 32": 9.0,
    "spd_step_ 1 x 32": 8.5,
    "spd_step_ 16 x 32": 46.0,
    "oput_loss_and_grad_ 2 x 4096": 1250.0,
}

CASES: tuple[Callable[[], GpuCase], ...] = (
    lambda: top1_case(1, torch.bfloat16, None),
    lambda: top1_case(32, torch.bfloat16, 6.0),
    lambda: top1_case(32, torch.float32, None),
    lambda: top1_case(256, torch.bfloat16, None),
    lambda: top1_case(4096, torch.bfloat16, None),
    lambda: topk_case(32, 4),
    lambda: statistics_case(32),
    lambda: statistics_case(4096),
    lambda: sample_case(32),
    lambda: sample_case(1024),
    promote_case,
    hybrid_case,
    lambda: spd_case(1, 32, 8.0),
    lambda: spd_case(1, 32, None, top_k=4),
    lambda: spd_case(16, 32, 45.0),
    lambda: loss_case(4096, in_place=False),
    lambda: loss_case(4096, in_place=True),
)


def predicted(name: str) -> float | None:
    for prefix, microseconds in PREDICTED_US.items():
        if name.startswith(prefix) and "float32" not in name and "top_k=4" not in name:
            return microseconds
    return None


def measure(case: GpuCase, bandwidth: float, repetitions: int, flush: torch.Tensor) -> dict:
    rows = {}
    for name, candidate in case.candidates.items():
        how = "graph"
        try:
            run = captured(candidate)
        except Exception:  # eager code that syncs cannot be captured: timed as it runs
            torch.cuda.synchronize()
            run, how = candidate, "eager"
        seconds = timed(run, repetitions, flush, case.restore)
        low, _, high = statistics.quantiles(seconds, n=4)
        median = statistics.median(seconds)
        rows[name] = {"us": round(median * 1e6, 2), "spread": round((high - low) / median, 3),
                      "run": how}  # fmt: skip
    fused = rows["fused"]["us"]
    return {
        "case": case.name,
        "candidates": rows,
        "speed-up over eager": round(rows["eager"]["us"] / fused, 2),
        "share of copy bandwidth": round(case.bytes_moved / (fused * 1e-6) / bandwidth, 3),
        "target us (H200)": case.target_us,
        "predicted us (H200)": predicted(case.name),
    }


def run_all(repetitions: int = 200) -> dict:
    bandwidth = copy_bandwidth()
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    results = []
    for build in CASES:
        case = build()
        slow = "oput" in case.name or "4096" in case.name
        results.append(measure(case, bandwidth, 30 if slow else repetitions, flush))
        print(results[-1], flush=True)
        del case
        torch.cuda.empty_cache()
    return {"copy GB/s": round(bandwidth / 1e9, 1), "results": results}
