"""Calls of the ops for the stages of a session: ``bench/gpu_calls.py check|splits|small|key``.

    check   every op on small inputs against the CPU's results; exit code 1 if one is off
    splits  the times of rows under every way to split them, as one line of JSON
    small   the CUDA kernels on the inputs of check, with nothing compared: for compute-sanitizer
    key     the op of each key case, twice: for the profiler

Inputs are made on the CPU, so that both devices get the same ones.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "python_tests")]

import dmax_kernels  # noqa: E402
from dmax_kernels.ops.edit_step import EDIT_RULES  # noqa: E402

Call = Callable[[str], list[torch.Tensor]]  # device -> results
DONE = "calls: done"
SPLIT_ROWS = (1, 8, 16, 32, 64, 128, 256, 384, 512, 768, 1024)
SPLITS = (1, 2, 3, 4, 5, 6, 8, 10)


def calls() -> Iterator[tuple[str, torch.dtype, Call]]:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for vocab in (7, 2049, 20_001):
            logits = torch.randn(4, vocab).to(dtype)
            for name, call in row_calls(logits):
                yield f"{name} 4 x {vocab} {dtype}", dtype, call
        for dim in (13, 264):
            yield f"hybrid_embedding {dim} {dtype}", dtype, hybrid_call(dtype, dim)
        for semantics in ("settled", "paper", "released"):
            for top_k in (1, 3):
                name = f"spd_step_ {semantics} top_k {top_k} {dtype}"
                yield name, dtype, step_call(dtype, semantics, top_k)
        for rule in EDIT_RULES:
            yield f"edit_step_ {rule} {dtype}", dtype, edit_call(dtype, rule)
    confidence = torch.rand(3, 40)

    def promote(device):
        x = confidence.to(device)
        return [dmax_kernels.prefix_promote(x, x < 0.7, 0.5)]

    yield "prefix_promote", torch.float32, promote


def row_calls(logits: torch.Tensor) -> Iterator[tuple[str, Call]]:
    vocab = logits.shape[-1]
    seed, target = torch.tensor([1, 2]), torch.tensor([0, 1, -100, vocab - 1])

    def simple(function, *arguments, **options):
        def call(device):
            moved = [x.to(device) if torch.is_tensor(x) else x for x in arguments]
            return list(function(logits.to(device), *moved, **options))

        return call

    yield "top1_confidence", simple(dmax_kernels.top1_confidence, suppress_token=3)
    yield "topk_confidence", simple(dmax_kernels.topk_confidence, 3)
    yield "row_statistics", simple(dmax_kernels.row_statistics)
    ids = torch.arange(logits.shape[0]) % vocab
    yield "token_logprobs", simple(dmax_kernels.token_logprobs, ids, top_n=3)
    yield "sample_tokens", simple(dmax_kernels.sample_tokens, seed)

    def filtered(device, **options):
        ties = logits.round()  # more equal ones than the search for the cut can list
        draws = (dmax_kernels.sample_tokens(x.to(device), seed.to(device), **options)
                 for x in (logits, ties))  # fmt: skip
        return [result for draw in draws for result in draw]

    yield "sample_tokens top_k", lambda device: filtered(device, top_k=max(vocab // 2, 1))
    yield "sample_tokens top_p", lambda device: filtered(device, top_p=0.9)
    yield "sample_tokens both", lambda device: filtered(device, top_k=5, top_p=0.5, min_p=0.01)

    counts = torch.arange(vocab, dtype=torch.int32) % 3
    words = torch.full((-(-vocab // 32),), 5, dtype=torch.int32)
    penalties = {"output_counts": counts, "prompt_tokens": words, "repetition_penalty": 1.3}

    def transformed(device, **options):
        moved = {k: v.to(device) if torch.is_tensor(v) else v for k, v in options.items()}
        written = logits.to(device, copy=True)
        return [dmax_kernels.transform_logits_(written, **moved, frequency_penalty=0.3)]

    yield (
        "transform_logits_",
        lambda device: transformed(device, **penalties, softcap=5.0, bias=torch.ones(vocab)),
    )
    yield "transform_logits_ penalties", lambda device: transformed(device, **penalties)

    def shards(partial_op, merge, *options):
        def call(device):
            moved = [x.to(device) if torch.is_tensor(x) else x for x in options]
            cut, found = vocab // 128 * 64, []  # a draw takes 64 ids together
            for start, end in ((0, cut), (cut, vocab)):
                if start < end:
                    found.append(partial_op(logits[:, start:end].to(device), *moved, start))
            return list(merge(*(torch.stack(column) for column in zip(*found, strict=True))))

        return call

    yield "top1_partial", shards(dmax_kernels.top1_partial, dmax_kernels.top1_merge)
    yield "sample_partial", shards(dmax_kernels.sample_partial, dmax_kernels.sample_merge, seed)

    def loss(device):
        leaf = logits.to(device, copy=True).requires_grad_()
        losses = dmax_kernels.oput_loss(leaf, None, target.to(device))[0]
        losses.sum().backward()
        return [losses.detach(), leaf.grad]

    def loss_in_place(device):
        masked, predicted = (logits.to(device, copy=True) for _ in range(2))
        losses = dmax_kernels.oput_loss_and_grad_(masked, predicted, target.to(device))
        return [*losses, masked, predicted]

    yield "oput_loss", loss
    yield "oput_loss_and_grad_", loss_in_place


def hybrid_call(dtype: torch.dtype, dim: int) -> Call:
    embedding, confidence = torch.randn(50, dim).to(dtype), torch.rand(6, 2) / 2
    token, masked = torch.randint(0, 50, (6, 2)), torch.arange(6) % 3 == 0

    def call(device):
        table = embedding.to(device, copy=True).requires_grad_()
        rest = [x.to(device) for x in (token, confidence, masked)]
        mixed = dmax_kernels.hybrid_embedding(table, *rest, 49)
        mixed.sum().backward()
        return [mixed.detach(), table.grad]

    return call


def step_call(dtype: torch.dtype, semantics: str, top_k: int) -> Call:
    from test_simt_embeddings import spd_case

    logits, embedding, start = spd_case(3, 4, vocab=20_001, dtype=dtype)

    def call(device):
        state = {name: tensor.to(device, copy=True) for name, tensor in start.items()}
        dmax_kernels.spd_step_(
            logits.to(device), embedding.to(device), **state, mask_token_id=39, tau_dec=0.5,
            tau_acc=0.9, semantics=semantics, top_k=top_k,
        )  # fmt: skip
        return list(state.values())

    return call


def edit_call(dtype: torch.dtype, rule: str) -> Call:
    from edit_cases import EDIT_OPTIONS, edit_case

    logits, start = edit_case(4, 4, vocab=20_001, dtype=dtype)

    def call(device):
        state = {name: tensor.to(device, copy=True) for name, tensor in start.items()}
        for _ in range(3):
            dmax_kernels.edit_step_(logits.to(device), **state, **EDIT_OPTIONS, rule=rule)
        return list(state.values())

    return call


def linear_calls() -> Iterator[tuple[str, torch.dtype, Call]]:
    """Triton's ops, which run in every stage but the sanitizer's."""
    for dtype in (torch.float32, torch.bfloat16):
        for rows in (3, 200):
            hidden, weight = torch.randn(rows, 64).to(dtype), torch.randn(300, 64).to(dtype) / 8
            target = torch.arange(rows) % 300

            def top1(device, hidden=hidden, weight=weight):
                return list(
                    dmax_kernels.linear_top1_confidence(hidden.to(device), weight.to(device))
                )

            def loss(device, hidden=hidden, weight=weight, target=target):
                leaves = [x.to(device, copy=True).requires_grad_() for x in (hidden, weight)]
                value = dmax_kernels.linear_oput_loss(
                    leaves[0], None, leaves[1], target.to(device), reduction="mean"
                )
                value.backward()
                return [value.detach(), *(leaf.grad for leaf in leaves)]

            def soft(device, hidden=hidden, weight=weight):
                logits = (hidden.float() @ weight.float().t()).to(device)
                weight = weight.to(device)
                soft = dmax_kernels.soft_embedding(logits, weight, temperature=0.7)
                return [soft, dmax_kernels.soft_embedding(logits, weight, top_p=0.9)]

            yield f"linear_top1_confidence {rows} {dtype}", dtype, top1
            yield f"soft_embedding {rows} {dtype}", dtype, soft
            yield f"linear_oput_loss {rows} {dtype}", dtype, loss


def check(device: str) -> int:
    """Every op in a process of its own, since an error may take the GPU from its process."""
    ops = list(dict.fromkeys(name.split()[0] for name, *_ in (*calls(), *linear_calls())))
    if device == "cpu":
        return max(check_op(op, device) for op in ops)

    def run(op: str) -> int:
        command = [sys.executable, __file__, "check", "--device", device, "--op", op]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = [line for line in done.stdout.splitlines() if line != DONE]
        if done.returncode not in (0, 1):
            lines.append(f"{op}: exit code {done.returncode}: {done.stderr[-500:]!r}")
        print("\n".join(lines), flush=True)
        return done.returncode

    with ThreadPoolExecutor(max(2, (os.cpu_count() or 2) - 2)) as pool:
        return int(any(pool.map(run, ops)))


def check_op(op: str, device: str) -> int:
    """Values to the precision of the dtype, everything else exactly; 1 if anything is off."""
    off = 0
    for name, dtype, call in (*calls(), *linear_calls()):
        if name.split()[0] != op:
            continue
        try:
            actual = [x.cpu() for x in call(device)]
            for result, expected in zip(actual, call("cpu"), strict=True):
                tolerance = 2e-4 if dtype == torch.float32 else 2e-2
                tolerance *= expected.is_floating_point()  # ids must be equal
                torch.testing.assert_close(
                    result, expected, rtol=tolerance, atol=tolerance, equal_nan=True
                )
            verdict = "as on the CPU"
        except Exception as error:
            off, verdict = off + 1, f"{type(error).__name__}: {error}".replace("\n", " ")[:300]
        print(f"{name}: {verdict}", flush=True)
    return min(off, 1)


def key(device: str) -> int:
    from bench.cases import key_cases
    from bench.fake_gpu import small

    for case in key_cases():
        work = (case if device == "cuda" else small(case)).work(device)
        for _ in range(2):
            if work.restore:
                work.restore()
            work.candidates["fused"]()
        print(case.name, flush=True)
        del work
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
    return 0


def time_splits(device: str) -> int:
    """Microseconds of ops over rows under every way to split a row among blocks (rows.cuh)."""
    from bench.cases import OF_ROWS, Case
    from bench.fake_gpu import FakeGpu, small
    from dmax_kernels.bench.gpu_timer import NODES, Gpu, copies_of

    gpu, repetitions = (Gpu(), 15) if device == "cuda" else (FakeGpu(), 1)
    library = ctypes.CDLL(str(dmax_kernels.libraries.cuda)) if device == "cuda" else None
    found: dict[str, dict[str, float]] = {}
    for workload in ("top1_confidence", "row_statistics", "spd_step_"):
        for rows in SPLIT_ROWS:
            case = Case(workload, OF_ROWS[workload](rows))
            case = case if device == "cuda" else small(case)
            gpu.release()
            works = copies_of(lambda case=case: case.work(device), gpu)
            calls = [work.candidates["fused"] for work in works]
            restores = [work.restore for work in works if work.restore]
            if not restores and rows <= 512:
                calls = [calls[i % len(calls)] for i in range(NODES)]
            ways = {"cluster": (1 << 30, -1)} if rows <= 64 else {}
            ways = {"chosen": (-1, -1)} | ways | {str(n): (0, n) for n in SPLITS}
            times = {}
            for way, (most_rows, splits) in ways.items():
                if library:
                    library.dmax_cuda_tune(most_rows, splits)
                run, _ = gpu.captured(calls)
                seconds = []
                for _ in range(repetitions):
                    for restore in restores:
                        restore()
                    gpu.flush()
                    seconds.append(gpu.seconds(run))
                times[way] = round(statistics.median(seconds) / len(calls) * 1e6, 2)
            found[f"{workload} {rows}"] = times
    if library:
        library.dmax_cuda_tune(-1, -1)
    print(json.dumps(found))
    return 0


def small_calls(device: str) -> int:
    for name, _, call in calls():
        call(device)
        print(name, flush=True)
    if device == "cuda":
        torch.cuda.synchronize()
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    what: dict[str, Callable[[str], int]] = {
        "check": check,
        "splits": time_splits,
        "small": small_calls,
        "key": key,
    }
    parser.add_argument("what", choices=what)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--op", help="of check: only this one, in this process")
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.op:
        code = check_op(options.op, options.device)
    else:
        code = what[options.what](options.device)
    print(DONE)
    return code


if __name__ == "__main__":
    sys.exit(main())
