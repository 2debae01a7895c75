"""Accuracy and speed of a model on held-out problems."""

from __future__ import annotations

import torch
from torch import nn

from dmax_kernels.decoding import spd_generate
from dmax_kernels.models import ring_walk
from dmax_kernels.training.ring_walk.distill import MAX_NEW_TOKENS


def evaluate(
    model: nn.Module,
    problems: list[ring_walk.Problem],
    *,
    rule: str,
    tau_dec: float,
    ops: str = "reference",
) -> dict[str, float | str]:
    """Shares of right answers and right derivations, and tokens per denoising forward pass.

    Tokens per forward is the mean over problems of tokens (up to `<eos>`) over forwards; a pass
    that refreshes the KV cache is not counted, as the loop makes none.
    """
    prompts = torch.tensor(
        [ring_walk.encode_prompt(problem, model.config.block_length) for problem in problems]
    )
    out = spd_generate(
        model,
        prompts,
        block_length=model.config.block_length,
        max_new_tokens=MAX_NEW_TOKENS,
        tau_dec=tau_dec,
        rule=rule,
        ops=ops,
    )
    responses = out.sequences[:, prompts.shape[1] :].tolist()
    grades = [
        ring_walk.grade(problem, ring_walk.decode(response))
        for problem, response in zip(problems, responses, strict=True)
    ]
    return {
        "rule": rule,
        "tau_dec": tau_dec,
        "problems": len(problems),
        "answer": sum(grade.answer for grade in grades) / len(grades),
        "strict": sum(grade.strict for grade in grades) / len(grades),
        "tokens_per_forward": float((out.num_tokens.float() / out.num_forwards).mean()),
    }
