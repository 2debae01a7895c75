"""Workloads of promotion, hybrid embeddings, and the whole step after a forward pass."""

from __future__ import annotations

import torch

import dmax_kernels
from dmax_kernels import reference
from dmax_kernels.benchmark.workload import BLOCK, DIM, MASK, VOCAB, Inputs, Work, workload


@workload
def prefix_promote(inputs: Inputs, blocks: int = 16, block: int = BLOCK) -> Work:
    """Eager is the reference: the same eight small ops that engines run today."""
    confidence, masked = inputs.uniform(blocks, block), inputs.uniform(blocks, block) < 0.7
    return Work(
        {
            "eager": lambda: reference.prefix_promote(confidence, masked, 0.5),
            "fused": lambda: dmax_kernels.prefix_promote(confidence, masked, 0.5),
        },
        confidence.nbytes + 2 * masked.nbytes,
    )


@workload
def hybrid_embedding(inputs: Inputs, rows: int = 32, dim: int = DIM, vocab: int = VOCAB) -> Work:
    """Gather, mix and rescale."""
    embedding = inputs.normal(vocab, dim)
    run = hybrid_arguments(inputs, embedding, rows)
    row_bytes = dim * embedding.element_size()
    return Work(
        {
            "eager": lambda: run(reference.hybrid_embedding),
            "fused": lambda: run(dmax_kernels.hybrid_embedding),
        },
        2 * rows * row_bytes,
    )


@workload
def hybrid_embedding_backward(
    inputs: Inputs, rows: int = 512, dim: int = DIM, vocab: int = 4096
) -> Work:
    """Forward and the dense gradient of the embedding table."""
    embedding = inputs.normal(vocab, dim).requires_grad_()
    run = hybrid_arguments(inputs, embedding, rows)
    grad = inputs.normal(rows, dim)
    return Work(
        {
            "eager": lambda: torch.autograd.grad(run(reference.hybrid_embedding), embedding, grad),
            "fused": lambda: torch.autograd.grad(
                run(dmax_kernels.hybrid_embedding), embedding, grad
            ),
        },
        3 * grad.nbytes + embedding.nbytes,
    )


def hybrid_arguments(inputs, embedding, rows):
    """The op on fixed arguments, three in ten of the rows masked."""
    vocab = embedding.shape[0]
    token, confidence = inputs.ids(rows, below=vocab), inputs.uniform(rows)
    masked = inputs.uniform(rows) < 0.3
    return lambda op: op(embedding, token, confidence, masked, min(MASK, vocab - 1))


@workload
def spd_step_(
    inputs: Inputs, batch: int = 1, block: int = BLOCK, vocab: int = VOCAB, dim: int = DIM
) -> Work:
    """A block in the middle of decoding: half of it masked, none converged."""
    logits = inputs.logits(batch * block, vocab).view(batch, block, vocab)
    embedding = inputs.normal(vocab, dim)
    mask_token_id = min(MASK, vocab - 1)
    position = torch.arange(block, device=inputs.device)
    start = {
        "masked": (position >= block // 2).expand(batch, block),
        "token": torch.full((batch, block), mask_token_id, device=inputs.device),
        "confidence": torch.zeros(batch, block, dtype=torch.float32, device=inputs.device),
        "converged": torch.zeros(batch, dtype=torch.bool, device=inputs.device),
        "step": torch.ones(batch, dtype=torch.int32, device=inputs.device),
        "inputs_embeds": torch.zeros(batch, block, dim, dtype=inputs.dtype, device=inputs.device),
    }
    state = {name: tensor.clone() for name, tensor in start.items()}
    editable = torch.ones(batch, block, dtype=torch.bool, device=inputs.device)

    def restore():
        for name, tensor in start.items():
            state[name].copy_(tensor)

    def run(op):
        op(logits, embedding, editable=editable, **state, mask_token_id=mask_token_id,
           tau_dec=0.5, tau_acc=0.9)  # fmt: skip

    return Work(
        {"eager": lambda: run(reference.spd_step_), "fused": lambda: run(dmax_kernels.spd_step_)},
        logits.nbytes + 3 * state["inputs_embeds"].nbytes,
        restore=restore,
    )
