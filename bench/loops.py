"""Two questions that no cell of the table answers: what happens to the smallest op when another
process has one of the cores, and what share of a loop's time is not the model's own.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch

from bench.cases import Case
from dmax_kernels.bench.timer import compare
from dmax_kernels.bench.workload import BLOCK, VOCAB

BUSY = "import os\nos.sched_setaffinity(0, {%d})\nprint(flush=True)\nwhile True: pass"
MOST_SLOWDOWN = 2.0


@contextmanager
def core_taken() -> Iterator[None]:
    """A second process computes on the last of the cores that this one may run on."""
    core = max(os.sched_getaffinity(0))
    other = subprocess.Popen([sys.executable, "-c", BUSY % core], stdout=subprocess.PIPE)
    try:
        other.stdout.readline()  # wait until it has begun
        yield
    finally:
        other.kill()
        other.communicate()


def busy_core(vocab: int = VOCAB, repetitions: int = 50) -> list[dict]:
    """One row of top1_confidence, on a quiet machine and with a core taken.

    The target: at most twice its own time on the quiet machine, or at most eager's on the busy one.
    """
    found = []
    for dtype in ("float32", "bfloat16"):
        candidates = Case("top1_confidence", (1, vocab), dtype).work().candidates
        quiet = compare(candidates, repetitions=repetitions, at_most_seconds=2.0)
        with core_taken():
            busy = compare(candidates, repetitions=repetitions, at_most_seconds=5.0)
        limit = MOST_SLOWDOWN * max(quiet["fused"].median, busy["eager"].median)
        found.append(
            {
                "case": f"top1_confidence 1 x {vocab} {dtype}",
                "threads": torch.get_num_threads(),
                "quiet": {name: each.row() for name, each in quiet.items()},
                "busy": {name: each.row() for name, each in busy.items()},
                "held": busy["fused"].median <= limit,
            }
        )
    return found


class ModelClock:
    """Seconds inside a model's forward passes, and in its backward pass: from the first gradient of
    its output (the loss's own backward pass comes before that) to the end."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model, self.forward, self.backward = model, 0.0, 0.0
        self.begun, self.arrived = 0.0, None

    def _before_forward(self, *_: Any) -> None:
        self.begun = time.perf_counter()

    def _after_forward(self, model: Any, arguments: Any, output: Any) -> None:
        self.forward += time.perf_counter() - self.begun
        states = output if torch.is_tensor(output) else output[0]
        if states.requires_grad:
            states.register_hook(self._gradient_arrives)

    def _gradient_arrives(self, _: torch.Tensor) -> None:
        self.arrived = self.arrived or time.perf_counter()

    def __enter__(self) -> ModelClock:
        self.call_backward = torch.Tensor.backward

        def backward(tensor: torch.Tensor, *arguments: Any, **options: Any) -> None:
            self.arrived = None
            self.call_backward(tensor, *arguments, **options)
            if self.arrived:
                self.backward += time.perf_counter() - self.arrived

        torch.Tensor.backward = backward
        self.hooks = [
            self.model.register_forward_pre_hook(self._before_forward),
            self.model.register_forward_hook(self._after_forward),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        torch.Tensor.backward = self.call_backward
        for hook in self.hooks:
            hook.remove()


def loop_shares(prompts: int = 8, repetitions: int = 5) -> list[dict]:
    """The demo's model in a decoding loop and in a training step: what share of the time is outside
    its forward and backward passes. In a training step that includes the LM head, which the fused
    loss runs, and the optimizer."""
    from dmax_kernels import decoding
    from dmax_kernels.models.checkpoint import load_checkpoint
    from dmax_kernels.ring_walk import task
    from dmax_kernels.ring_walk.data import ring_walk_examples
    from dmax_kernels.ring_walk.evaluate import encode_prompts
    from dmax_kernels.training.config import TrainConfig
    from dmax_kernels.training.loop import Trainer
    from dmax_kernels.training.parallel import Processes

    ids = encode_prompts(task.evaluation_problems(prompts), BLOCK)
    examples = list(islice(ring_walk_examples(prompts, BLOCK, seed=0), prompts))
    found = []
    for ops in ("reference", "fused"):
        model = load_checkpoint("oput")[0]

        def decode(model=model, ops=ops):
            decoding.spd_generate(model, ids, max_new_tokens=96, tau_dec=0.5, ops=ops)

        found.append({"loop": "decoding", "ops": ops, **share_outside(model, decode, repetitions)})
        learner = load_checkpoint("base")[0]
        config = TrainConfig(steps=1, batch_size=prompts, ops=ops)
        group = Processes(0, 1, torch.device("cpu"))
        trainer = Trainer.build(learner, config, task.EOS_ID, group)
        body = trainer.objective.net.backbone

        def train(trainer=trainer):
            trainer.step(0, examples)

        found.append({"loop": "training", "ops": ops, **share_outside(body, train, repetitions)})
    return found


def share_outside(
    model: torch.nn.Module, run: Callable[[], object], repetitions: int
) -> dict[str, float]:
    """The figures of the fastest repetition."""
    run()
    best: tuple[float, float] | None = None
    for _ in range(repetitions):
        with ModelClock(model) as clock:
            begin = time.perf_counter()
            run()
            seconds = time.perf_counter() - begin
        inside = clock.forward + clock.backward
        if best is None or seconds < best[0]:
            best = seconds, inside
    seconds, inside = best
    return {"us": round(seconds * 1e6), "share outside the model": round(1 - inside / seconds, 3)}
