"""Other packages' functions for the same results on a GPU, as candidates beside eager and ours.

Each adapter calls a package's public function on the workload's tensors. A package that is not
installed, or a call that fails, is listed as such in the results; only measured figures appear.
Signatures as of liger-kernel 0.8.5 and cut-cross-entropy 25.1.1 (their calls were tried), QuACK and
FlashInfer as of 2026 (read). bench/cpu_peers has what runs on a CPU.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch

from dmax_kernels.bench.workload import Work


@dataclass(frozen=True)
class Peer:
    workload: str
    name: str
    package: str  # the module's name in Python
    build: Callable[..., Callable[[], object]]  # (**given) -> candidate


PEERS: list[Peer] = []


def peer(workload: str, name: str, package: str) -> Callable:
    def register(build: Callable) -> Callable:
        PEERS.append(Peer(workload, name, package, build))
        return build

    return register


def add_peers(work: Work, workload: str) -> dict[str, str]:
    """Adds the installed peers to the candidates; returns why each of the others is missing."""
    absent = {}
    for each in PEERS:
        if each.workload != workload:
            continue
        if importlib.util.find_spec(each.package) is None:
            absent[each.name] = "not installed"
            continue
        try:
            work.candidates[each.name] = each.build(**work.given)
        except Exception as error:  # a peer's failure is a result, not ours to fix
            absent[each.name] = f"failed: {type(error).__name__}: {error}".splitlines()[0]
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
    def _(logits):
        return lambda: softmax(logits).max(dim=-1)

    @peer("linear_top1_confidence", f"product, then {name} softmax and max", package)
    def _(hidden, weight):
        return lambda: softmax(hidden @ weight.t()).max(dim=-1)


register_top1("Liger", "liger_kernel", liger_softmax)
register_top1("QuACK", "quack", quack_softmax)
register_top1("FlashInfer", "flashinfer", flashinfer_softmax)


@peer("sample_tokens", "FlashInfer sampling_from_logits (no probability)", "flashinfer")
def _(logits):
    from flashinfer.sampling import sampling_from_logits

    seed, offset = torch.tensor([1, 2], device=logits.device).split(1)
    return lambda: sampling_from_logits(logits, seed=seed, offset=offset)


@peer("linear_sample_tokens", "product, then FlashInfer sampling (no probability)", "flashinfer")
def _(hidden, weight):
    from flashinfer.sampling import sampling_from_logits

    seed, offset = torch.tensor([1, 2], device=hidden.device).split(1)
    return lambda: sampling_from_logits(hidden @ weight.t(), seed=seed, offset=offset)


def both_passes(loss: Callable, leaves: list[torch.Tensor], *more: torch.Tensor) -> Callable:
    """Forward and backward of both passes; the gradients of leaves and of `more`."""
    return lambda: torch.autograd.grad(sum(loss(x) for x in leaves), [*leaves, *more])


@peer("oput_loss", "Liger cross_entropy", "liger_kernel")
def _(masked, predicted, target):
    from liger_kernel.transformers.functional import liger_cross_entropy

    # Overwrites the logits with their gradients, hence the copies: later repetitions read those,
    # which costs the same
    leaves = [x.detach().clone().requires_grad_() for x in (masked, predicted)]
    return both_passes(lambda x: liger_cross_entropy(x, target), leaves)


@peer("oput_loss", "QuACK cross_entropy", "quack")
def _(masked, predicted, target):
    from quack.cross_entropy import cross_entropy

    return both_passes(lambda x: cross_entropy(x, target), [masked, predicted])


@peer("linear_oput_loss", "Liger fused_linear_cross_entropy", "liger_kernel")
def _(masked, predicted, weight, target):
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as loss

    return both_passes(lambda x: loss(x, weight, target), [masked, predicted], weight)


@peer("linear_oput_loss", "QuACK chunked_linear_cross_entropy", "quack")
def _(masked, predicted, weight, target):
    from quack.linear_cross_entropy import chunked_linear_cross_entropy as loss

    return both_passes(lambda x: loss(x, weight, target), [masked, predicted], weight)


@peer("linear_oput_loss", "cut-cross-entropy", "cut_cross_entropy")
def _(masked, predicted, weight, target):
    from cut_cross_entropy import linear_cross_entropy as loss

    return both_passes(lambda x: loss(x, weight, target), [masked, predicted], weight)
