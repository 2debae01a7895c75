"""Workloads of the two loops, on the small models that ship here: ops="reference" against fused.

The models are float32 whatever --dtype says, and so small that the forward passes, which both
candidates share, take most of the time: a large model's share is another.
"""

from __future__ import annotations

from itertools import islice

import torch

from dmax_kernels.bench.workload import Inputs, Work, workload


@workload
def spd_generate(inputs: Inputs, prompts: int = 8, new_tokens: int = 96) -> Work:
    """Soft Parallel Decoding of the demo's problems with its OPUT checkpoint."""
    from dmax_kernels import decoding
    from dmax_kernels.models.checkpoint import load_checkpoint
    from dmax_kernels.ring_walk import task

    model = load_checkpoint("oput")[0].to(inputs.device)
    problems = task.evaluation_problems(prompts)
    ids = torch.tensor([task.encode_prompt(problem, 32) for problem in problems])
    ids = ids.to(inputs.device)

    def run(ops):
        return decoding.spd_generate(
            model, ids, max_new_tokens=new_tokens, tau_dec=0.5, ops=ops
        ).sequences

    return Work({"eager": lambda: run("reference"), "fused": lambda: run("fused")})


@workload
def oput_step(inputs: Inputs, sequences: int = 8) -> Work:
    """One step of On-Policy Uniform Training, rollout to optimizer, from the base checkpoint."""
    from dmax_kernels.models.checkpoint import load_checkpoint
    from dmax_kernels.ring_walk import task
    from dmax_kernels.ring_walk.data import ring_walk_examples
    from dmax_kernels.training.config import TrainConfig
    from dmax_kernels.training.loop import Trainer
    from dmax_kernels.training.parallel import Processes

    examples = list(islice(ring_walk_examples(8, 32, seed=0), sequences))

    def step_with(ops):
        config = TrainConfig(steps=1, batch_size=sequences, ops=ops)
        model = load_checkpoint("base")[0]
        trainer = Trainer.build(
            model, config, task.EOS_ID, Processes(0, 1, torch.device(inputs.device))
        )

        def run():
            row = trainer.step(0, examples)
            return torch.tensor([row["loss_masked"], row["loss_predicted"], row["grad_norm"]])

        return run

    return Work({"eager": step_with("reference"), "fused": step_with("fused")})
