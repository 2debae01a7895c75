"""Other packages' way to the same results, as candidates beside eager and ours.

Each adapter calls a package's public function on tensors of the case's sizes and dtype. A package
that is not installed, or a call that fails, is listed as such in the results: a figure is only ever
one that was measured. All of these packages are for GPUs. Signatures as of liger-kernel 0.8.5 and
cut-cross-entropy 25.1.1 (their calls were tried), QuACK and FlashInfer as of 2026 (read).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch

from dmax_kernels.bench.workload import Inputs, Work


@dataclass(frozen=True)
class Peer:
    workload: str
    name: str
    package: str  # what Python imports
    build: Callable[..., Callable[[], object]]  # (inputs, *sizes) -> candidate


PEERS: list[Peer] = []


def peer(workload: str, name: str, package: str) -> Callable:
    def register(build: Callable) -> Callable:
        PEERS.append(Peer(workload, name, package, build))
        return build

    return register


def add_peers(work: Work, workload: str, inputs: Inputs, sizes: tuple[int, ...]) -> dict[str, str]:
    """Puts the peers that run here among the candidates; why each of the others does not."""
    absent = {}
    for each in PEERS:
        if each.workload != workload:
            continue
        if importlib.util.find_spec(each.package) is None:
            absent[each.name] = "not installed"
        elif inputs.device != "cuda":
            absent[each.name] = "needs a GPU"
        else:
            try:
                candidate = each.build(inputs, *sizes)
                candidate()
                torch.cuda.synchronize()
            except Exception as error:  # a peer's failure is a result, not ours to fix
                absent[each.name] = f"failed: {type(error).__name__}: {error}".splitlines()[0]
            else:
                work.candidates[each.name] = candidate
    return absent


def liger_softmax(x):
    from liger_kernel.transformers.functional import liger_softmax

    return liger_softmax(x)


def quack_softmax(x):
    from quack.softmax import softmax

    return softmax(x)


def flashinfer_softmax(x):
    from flashinfer.sampling import softmax

    return softmax(x)


def register_top1(name: str, package: str, softmax: Callable) -> None:
    @peer("top1_confidence", f"{name} softmax, then max", package)
    def _(inputs, rows, vocab):
        logits = inputs.logits(rows, vocab)
        return lambda: softmax(logits).max(dim=-1)

    @peer("linear_top1_confidence", f"product, then {name} softmax and max", package)
    def _(inputs, rows, dim, vocab):
        hidden, weight = inputs.normal(rows, dim), inputs.normal(vocab, dim, scale=dim**-0.5)
        return lambda: softmax(hidden @ weight.t()).max(dim=-1)


register_top1("Liger", "liger_kernel", liger_softmax)
register_top1("QuACK", "quack", quack_softmax)
register_top1("FlashInfer", "flashinfer", flashinfer_softmax)


@peer("sample_tokens", "FlashInfer sampling_from_logits (no probability)", "flashinfer")
def _(inputs, rows, vocab):
    from flashinfer.sampling import sampling_from_logits

    logits, (seed, offset) = inputs.logits(rows, vocab), inputs.seed().split(1)
    return lambda: sampling_from_logits(logits, seed=seed, offset=offset)


@peer("linear_sample_tokens", "product, then FlashInfer sampling (no probability)", "flashinfer")
def _(inputs, rows, dim, vocab):
    from flashinfer.sampling import sampling_from_logits

    hidden, weight = inputs.normal(rows, dim), inputs.normal(vocab, dim, scale=dim**-0.5)
    seed, offset = inputs.seed().split(1)
    return lambda: sampling_from_logits(hidden @ weight.t(), seed=seed, offset=offset)


def both_passes(loss: Callable, leaves: list[torch.Tensor], *more: torch.Tensor) -> Callable:
    """Forward and backward of both passes; the gradients of leaves and of `more`."""
    return lambda: torch.autograd.grad(sum(loss(x) for x in leaves), [*leaves, *more])


def logits_of_both(inputs, tokens, vocab):
    return [inputs.logits(tokens, vocab).requires_grad_() for _ in range(2)]


@peer("oput_loss", "Liger cross_entropy", "liger_kernel")
def _(inputs, tokens, vocab):
    from liger_kernel.transformers.functional import liger_cross_entropy

    # Overwrites the logits with their gradients: later repetitions read those, which costs the same
    leaves, target = logits_of_both(inputs, tokens, vocab), inputs.ids(tokens, below=vocab)
    return both_passes(lambda x: liger_cross_entropy(x, target), leaves)


@peer("oput_loss", "QuACK cross_entropy", "quack")
def _(inputs, tokens, vocab):
    from quack.cross_entropy import cross_entropy

    leaves, target = logits_of_both(inputs, tokens, vocab), inputs.ids(tokens, below=vocab)
    return both_passes(lambda x: cross_entropy(x, target), leaves)


def head_of_both(inputs, tokens, dim, vocab):
    hidden = [inputs.normal(tokens, dim).requires_grad_() for _ in range(2)]
    weight = inputs.normal(vocab, dim, scale=dim**-0.5).requires_grad_()
    return hidden, weight, inputs.ids(tokens, below=vocab)


@peer("linear_oput_loss", "Liger fused_linear_cross_entropy", "liger_kernel")
def _(inputs, tokens, dim, vocab):
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    hidden, weight, target = head_of_both(inputs, tokens, dim, vocab)
    return both_passes(
        lambda x: liger_fused_linear_cross_entropy(x, weight, target), hidden, weight
    )


@peer("linear_oput_loss", "QuACK chunked_linear_cross_entropy", "quack")
def _(inputs, tokens, dim, vocab):
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    hidden, weight, target = head_of_both(inputs, tokens, dim, vocab)
    return both_passes(lambda x: chunked_linear_cross_entropy(x, weight, target), hidden, weight)


@peer("linear_oput_loss", "cut-cross-entropy", "cut_cross_entropy")
def _(inputs, tokens, dim, vocab):
    from cut_cross_entropy import linear_cross_entropy

    hidden, weight, target = head_of_both(inputs, tokens, dim, vocab)
    return both_passes(lambda x: linear_cross_entropy(x, weight, target), hidden, weight)
