"""Workloads of decoding: rows of logits, promotion, embeddings, and the loop.

Products with the LM head are in the inputs' dtype over the whole vocabulary, which rounds 16-bit
logits; the fused ops keep theirs in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import dmax_kernels
from dmax_kernels import reference
from dmax_kernels.bench.draws import exponential_race
from dmax_kernels.bench.workload import BLOCK, DIM, MASK, VOCAB, Inputs, Work, workload


@workload
def top1_confidence(inputs: Inputs, rows: int = 32, vocab: int = VOCAB) -> Work:
    """Softmax, then max: the eager way to a token and its confidence."""
    logits = inputs.logits(rows, vocab)
    return Work(
        {
            "eager": lambda: torch.softmax(logits, dim=-1).max(dim=-1),
            "fused": lambda: dmax_kernels.top1_confidence(logits),
        },
        logits.nbytes,
        given={"logits": logits},
    )


@workload
def topk_confidence(inputs: Inputs, rows: int = 32, vocab: int = VOCAB, k: int = 4) -> Work:
    """Softmax, then topk."""
    logits = inputs.logits(rows, vocab)
    return Work(
        {
            "eager": lambda: torch.softmax(logits, dim=-1).topk(k, dim=-1),
            "fused": lambda: dmax_kernels.topk_confidence(logits, k),
        },
        logits.nbytes,
        given={"logits": logits, "k": k},
    )


@workload
def row_statistics(inputs: Inputs, rows: int = 32, vocab: int = VOCAB) -> Work:
    """Softmax in float32, its two largest, its entropy, and logsumexp: four reads or more."""
    logits = inputs.logits(rows, vocab)

    def eager():
        x = logits.float()  # an entropy summed in 16 bits would be noise
        probability = torch.softmax(x, dim=-1)
        top, token = probability.topk(2, dim=-1)
        entropy = torch.special.entr(probability).sum(dim=-1)
        return token[..., 0], top[..., 0], top[..., 1], entropy, torch.logsumexp(x, dim=-1)

    return Work(
        {
            "eager": eager,
            "fused": lambda: dmax_kernels.row_statistics(logits),
            "top1_confidence": lambda: dmax_kernels.top1_confidence(logits),
        },
        logits.nbytes,
        given={"logits": logits},
    )


def eager_logprobs(logits: torch.Tensor, ids: torch.Tensor, top_n: int) -> tuple[torch.Tensor, ...]:
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    logprob = logprobs.gather(-1, ids.unsqueeze(-1))
    rank = (logprobs > logprob).sum(dim=-1)
    top_logprobs, top_ids = logprobs.topk(top_n, dim=-1)
    return logprob.squeeze(-1), rank, top_ids, top_logprobs


@workload
def token_logprobs(inputs: Inputs, rows: int = 32, vocab: int = VOCAB, top_n: int = 20) -> Work:
    """Log-softmax in float32, a token's value and rank in it, and topk: engines' ``logprobs=n``."""
    logits, ids = inputs.logits(rows, vocab), inputs.ids(rows, below=vocab)
    return Work(
        {
            "eager": lambda: eager_logprobs(logits, ids, top_n),
            "fused": lambda: dmax_kernels.token_logprobs(logits, ids, top_n=top_n),
            "top1_confidence": lambda: dmax_kernels.top1_confidence(logits),
        },
        logits.nbytes,
        given={"logits": logits, "ids": ids, "top_n": top_n},
    )


@workload
def draw_with_entropy(inputs: Inputs, rows: int = 32, vocab: int = VOCAB) -> Work:
    """What a rule that draws asks of a row: its top-1, its entropy, and a sample."""
    logits, seed = inputs.logits(rows, vocab), inputs.seed()

    def eager():
        x = logits.float()
        probability = torch.softmax(x, dim=-1)
        entropy = torch.special.entr(probability).sum(dim=-1)
        return x.argmax(dim=-1), torch.multinomial(probability, 1)[..., 0], entropy

    def fused():
        found = dmax_kernels.row_statistics(logits)
        return found.token, dmax_kernels.sample_tokens(logits, seed)[0], found.entropy

    return Work({"eager": eager, "fused": fused}, logits.nbytes, given={"logits": logits})


def merged_shards(inputs: Inputs, rows: int, vocab: int, shards: int, run: Callable) -> Work:
    """run(backend, [(columns, first id)]) of every shard, as tensor-parallel ranks run them."""
    parts = inputs.logits(rows, vocab).chunk(shards, dim=-1)
    cut = [(part, i * parts[0].shape[-1]) for i, part in enumerate(parts)]
    return Work(
        {"eager": lambda: run(reference, cut), "fused": lambda: run(dmax_kernels, cut)},
        sum(part.nbytes for part in parts),
        given={"shards": cut},
    )


def stack_columns(found: list[tuple[torch.Tensor, ...]]) -> list[torch.Tensor]:
    return [torch.stack(column) for column in zip(*found, strict=True)]


@workload
def top1_partial(inputs: Inputs, rows: int = 32, vocab: int = VOCAB, shards: int = 8) -> Work:
    """Every shard's top1_partial and their top1_merge."""

    def run(backend, cut):
        found = [backend.top1_partial(part, start) for part, start in cut]
        return backend.top1_merge(*stack_columns(found))

    return merged_shards(inputs, rows, vocab, shards, run)


@workload
def sample_partial(inputs: Inputs, rows: int = 32, vocab: int = VOCAB, shards: int = 8) -> Work:
    """Every shard's sample_partial and their sample_merge."""
    seed = inputs.seed()

    def run(backend, cut):
        found = [backend.sample_partial(part, seed, start) for part, start in cut]
        return backend.sample_merge(*stack_columns(found))

    return merged_shards(inputs, rows, vocab, shards, run)


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
        given={"confidence": confidence, "masked": masked, "threshold": 0.5},
    )


@workload
def hybrid_embedding(inputs: Inputs, rows: int = 32, dim: int = DIM, vocab: int = VOCAB) -> Work:
    """Gather, mix and rescale."""
    embedding = inputs.normal(vocab, dim)
    given = hybrid_arguments(inputs, embedding, rows)
    row_bytes = dim * embedding.element_size()
    return Work(
        {
            "eager": lambda: reference.hybrid_embedding(**given),
            "fused": lambda: dmax_kernels.hybrid_embedding(**given),
        },
        2 * rows * row_bytes,
        given=given,
        writes=True,
    )


@workload
def soft_embedding(inputs: Inputs, rows: int = 32, dim: int = DIM, vocab: int = VOCAB) -> Work:
    """Softmax in float32, rounded to the embedding's dtype, and the product: what engines run."""
    logits, embedding = inputs.logits(rows, vocab).float(), inputs.normal(vocab, dim)
    return Work(
        {
            "eager": lambda: torch.softmax(logits, dim=-1).to(embedding.dtype) @ embedding,
            "fused": lambda: dmax_kernels.soft_embedding(logits, embedding),
        },
        logits.nbytes + embedding.nbytes,
        2 * rows * dim * vocab,
        inputs.dtype,
        given={"logits": logits, "embedding": embedding},
    )


@workload
def hybrid_embedding_backward(
    inputs: Inputs, rows: int = 512, dim: int = DIM, vocab: int = 4096
) -> Work:
    """Forward and the dense gradient of the embedding table."""
    embedding = inputs.normal(vocab, dim).requires_grad_()
    given = hybrid_arguments(inputs, embedding, rows)
    grad = inputs.normal(rows, dim)

    def run(op: Callable) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(op(**given), embedding, grad)

    return Work(
        {
            "eager": lambda: run(reference.hybrid_embedding),
            "fused": lambda: run(dmax_kernels.hybrid_embedding),
        },
        3 * grad.nbytes + embedding.nbytes,
        given={**given, "grad": grad},
        writes=True,
    )


def hybrid_arguments(inputs: Inputs, embedding: torch.Tensor, rows: int) -> dict[str, Any]:
    """Three in ten of the rows are masked."""
    vocab = embedding.shape[0]
    return {
        "embedding": embedding,
        "token": inputs.ids(rows, below=vocab),
        "confidence": inputs.uniform(rows),
        "masked": inputs.uniform(rows) < 0.3,
        "mask_token_id": min(MASK, vocab - 1),
    }


@workload
def linear_top1_confidence(
    inputs: Inputs, rows: int = 32, dim: int = DIM, vocab: int = VOCAB
) -> Work:
    """Head product, then softmax and max; head product, then our top1_confidence."""
    hidden, weight = inputs.normal(rows, dim), inputs.normal(vocab, dim, scale=dim**-0.5)
    return Work(
        {
            "eager": lambda: torch.softmax((hidden @ weight.t()).float(), dim=-1).max(dim=-1),
            "product, then top1_confidence": lambda: dmax_kernels.top1_confidence(
                hidden @ weight.t()
            ),
            "fused": lambda: dmax_kernels.linear_top1_confidence(hidden, weight),
        },
        hidden.nbytes + weight.nbytes,
        2 * rows * dim * vocab,
        inputs.dtype,
        given={"hidden": hidden, "weight": weight},
    )


@workload
def linear_sample_tokens(
    inputs: Inputs, rows: int = 32, dim: int = DIM, vocab: int = VOCAB
) -> Work:
    """The head's product, then a sample."""
    hidden, weight = inputs.normal(rows, dim), inputs.normal(vocab, dim, scale=dim**-0.5)
    seed = inputs.seed()
    return Work(
        {
            "eager": lambda: exponential_race(hidden @ weight.t()),
            "product, then sample_tokens": lambda: dmax_kernels.sample_tokens(
                hidden @ weight.t(), seed
            ),
            "fused": lambda: dmax_kernels.linear_sample_tokens(hidden, weight, seed),
        },
        hidden.nbytes + weight.nbytes,
        2 * rows * dim * vocab,
        inputs.dtype,
        given={"hidden": hidden, "weight": weight},
    )


@workload
def linear_token_logprobs(
    inputs: Inputs, rows: int = 64, dim: int = DIM, vocab: int = VOCAB, top_n: int = 20
) -> Work:
    """The head's product, then what token_logprobs reports."""
    hidden, weight = inputs.normal(rows, dim), inputs.normal(vocab, dim, scale=dim**-0.5)
    ids = inputs.ids(rows, below=vocab)
    return Work(
        {
            "eager": lambda: eager_logprobs(hidden @ weight.t(), ids, top_n),
            "product, then token_logprobs": lambda: dmax_kernels.token_logprobs(
                hidden @ weight.t(), ids, top_n=top_n
            ),
            "fused": lambda: dmax_kernels.linear_token_logprobs(hidden, weight, ids, top_n=top_n),
        },
        hidden.nbytes + weight.nbytes,
        2 * rows * dim * vocab,
        inputs.dtype,
        given={"hidden": hidden, "weight": weight},
    )


@workload
def spd_generate(inputs: Inputs, prompts: int = 8, new_tokens: int = 96) -> Work:
    """Soft Parallel Decoding of the demo's problems with its OPUT checkpoint, in float32.

    The small model's forward passes, which both candidates share, take most of the time. A large
    model's share is different.
    """
    from dmax_kernels import decoding
    from dmax_kernels.models.checkpoint import load_checkpoint
    from dmax_kernels.ring_walk import task
    from dmax_kernels.ring_walk.evaluate import encode_prompts

    model = load_checkpoint("oput")[0].to(inputs.device)
    ids = encode_prompts(task.evaluation_problems(prompts), BLOCK).to(inputs.device)

    def run(ops):
        return decoding.spd_generate(
            model, ids, max_new_tokens=new_tokens, tau_dec=0.5, ops=ops
        ).sequences

    return Work({"eager": lambda: run("reference"), "fused": lambda: run("fused")})
