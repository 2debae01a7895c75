"""Workloads of a whole decoding step, which changes a block's state in place."""

from __future__ import annotations

from typing import Any

import torch

import dmax_kernels
from dmax_kernels import reference
from dmax_kernels.bench.workload import BLOCK, DIM, MASK, VOCAB, Inputs, Work, workload


def step_work(op: str, state: dict[str, torch.Tensor], given: dict[str, Any], bytes: int) -> Work:
    """Both candidates on one state, which is put back before every call."""
    start = {name: tensor.clone() for name, tensor in state.items()}
    given = {**given, **state}

    def restore():
        for name, tensor in start.items():
            state[name].copy_(tensor)

    return Work(
        {
            "eager": lambda: getattr(reference, op)(**given),
            "fused": lambda: getattr(dmax_kernels, op)(**given),
        },
        bytes,
        restore=restore,
        given=given,
    )


@workload
def spd_step_(
    inputs: Inputs, batch: int = 1, block: int = BLOCK, vocab: int = VOCAB, dim: int = DIM
) -> Work:
    """A block in the middle of decoding: half of it masked, none converged."""
    device = inputs.device
    logits = inputs.logits(batch * block, vocab).view(batch, block, vocab)
    embedding = inputs.normal(vocab, dim)
    mask_token_id = min(MASK, vocab - 1)
    position = torch.arange(block, device=device)
    state = {
        "masked": (position >= block // 2).expand(batch, block).contiguous(),
        "token": torch.full((batch, block), mask_token_id, device=device),
        "confidence": torch.zeros(batch, block, dtype=torch.float32, device=device),
        "converged": torch.zeros(batch, dtype=torch.bool, device=device),
        "step": torch.ones(batch, dtype=torch.int32, device=device),
        "inputs_embeds": torch.zeros(batch, block, dim, dtype=inputs.dtype, device=device),
    }
    given = {
        "logits": logits,
        "embedding": embedding,
        "editable": torch.ones(batch, block, dtype=torch.bool, device=device),
        "mask_token_id": mask_token_id,
        "tau_dec": 0.5,
        "tau_acc": 0.9,
    }
    return step_work("spd_step_", state, given, logits.nbytes + 3 * state["inputs_embeds"].nbytes)


@workload
def edit_step_(inputs: Inputs, batch: int = 1, block: int = BLOCK, vocab: int = VOCAB) -> Work:
    """A block in the middle of joint-threshold decoding: half of it masked, all of it read."""
    device = inputs.device
    logits = inputs.logits(batch * block, vocab).view(batch, block, vocab)
    mask_token_id = min(MASK, vocab - 1)
    token = inputs.ids(batch, block, below=vocab)
    token[:, block // 2 :] = mask_token_id
    state = {
        "token": token,
        "prediction": torch.zeros_like(token),
        "confidence": torch.zeros(batch, block, dtype=torch.float32, device=device),
        "post_edit_steps": torch.zeros(batch, dtype=torch.int32, device=device),
        "done": torch.zeros(batch, dtype=torch.bool, device=device),
    }
    given = {
        "logits": logits,
        "editable": torch.ones(batch, block, dtype=torch.bool, device=device),
        "mask_token_id": mask_token_id,
        "threshold": 0.7,
        "edit_threshold": 0.5,
        "rule": "joint_threshold",
    }
    return step_work("edit_step_", state, given, logits.nbytes)
