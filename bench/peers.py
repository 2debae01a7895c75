"""Other packages' functions for the same results on a GPU, as candidates beside eager and ours.

Each adapter calls a package's public function on the workload's tensors. At its first call a peer's
results are compared with eager's (bench/peer_checks.py); a package that is not installed, a call
that fails and a result that is off are listed as such, and only the others are timed. Signatures as
of flashinfer-python 0.7.2, liger-kernel 0.8.5, cut-cross-entropy 25.1.1 and quack-kernels 0.6.5,
which bench/carry_peers.py installs. bench/cpu_peers has what runs on a CPU.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

from bench.peer_checks import why_off
from dmax_kernels.bench.workload import Work


@dataclass(frozen=True)
class Peer:
    workload: str
    name: str
    package: str  # the module's name in Python
    build: Callable[..., Callable[[], object]]  # (**given) -> candidate
    # What eager returns, from what the candidate returns: (result, **given)
    as_eager: Callable[..., Any] | None = None


PEERS: list[Peer] = []


def peer(workload: str, name: str, package: str, as_eager: Callable | None = None) -> Callable:
    def register(build: Callable) -> Callable:
        PEERS.append(Peer(workload, name, package, build, as_eager))
        return build

    return register


def add_peers(
    work: Work, workload: str, checked: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Adds the installed peers to the candidates; returns why each of the others is missing.

    `checked` is an earlier answer for the same work on other tensors: no peer is called then.
    """
    absent = dict(checked or {})
    eager: Any = None
    for each in PEERS:
        if each.workload != workload or each.name in absent:
            continue
        if importlib.util.find_spec(each.package) is None:
            absent[each.name] = "not installed"
            continue
        try:
            candidate = each.build(**work.given)
            if checked is None:
                if eager is None:
                    eager = call(work, work.candidates["eager"])
                found = call(work, candidate)
                found = each.as_eager(found, **work.given) if each.as_eager else found
                if reason := why_off(workload, work.given, eager, found):
                    absent[each.name] = f"off: {reason}"
                    continue
            work.candidates[each.name] = candidate
        except Exception as error:  # a peer's failure is a result, not ours to fix
            absent[each.name] = f"failed: {type(error).__name__}: {error}".splitlines()[0]
    if eager is not None and torch.cuda.is_available():
        eager = None
        torch.cuda.empty_cache()  # the timer looks at how much is free
    return absent


def call(work: Work, candidate: Callable[[], Any]) -> Any:
    """What it returns, before the tensors that it overwrites are restored."""
    found = candidate()
    if work.restore:
        found = [x.clone() for x in found]
        work.restore()
    return found


# QuACK's compiler is a package of 240 MB. bench/carry_peers.py can compile its kernels ahead
QUACK = "quack" if importlib.util.find_spec("quack") else "quack_ahead"
QUACK_NAME = "QuACK" if QUACK == "quack" else "QuACK (compiled ahead)"


def quack(function: str) -> Callable:
    """The function of that name, from the module of QuACK that has it."""
    module = "softmax" if function == "softmax" else "cross_entropy"
    return getattr(import_module(QUACK if QUACK != "quack" else f"quack.{module}"), function)


def liger(function: str) -> Callable:
    return getattr(import_module("liger_kernel.transformers.functional"), f"liger_{function}")


def flashinfer(function: str) -> Callable:
    return getattr(import_module("flashinfer.sampling"), function)


def register_top1(name: str, package: str, softmax: Callable[[], Callable]) -> None:
    @peer("top1_confidence", f"{name} softmax, then max", package)
    def _(logits):
        function = softmax()
        return lambda: function(logits).max(dim=-1)

    @peer("linear_top1_confidence", f"product, then {name} softmax and max", package)
    def _(hidden, weight):
        function = softmax()
        return lambda: function(hidden @ weight.t()).max(dim=-1)


register_top1("Liger", "liger_kernel", lambda: liger("softmax"))
register_top1(QUACK_NAME, QUACK, lambda: quack("softmax"))
register_top1("FlashInfer", "flashinfer", lambda: flashinfer("softmax"))


@peer("topk_confidence", "FlashInfer softmax, then top_k", "flashinfer")
def _(logits, k):
    softmax = flashinfer("softmax")
    top_k = import_module("flashinfer.topk").top_k
    return lambda: top_k(softmax(logits), k, sorted=True, deterministic=True)


# FlashInfer's samplers make a float32 copy of 16-bit logits inside, which the times include. They
# are deterministic by default, as ours are; both are listed where the flag has an effect. Seeds are
# tensors, which a graph can replay


def seeds(device: torch.device) -> dict[str, torch.Tensor]:
    seed, offset = torch.tensor([1, 2], device=device).split(1)
    return {"seed": seed, "offset": offset}


@peer("sample_tokens", "FlashInfer sampling_from_logits (no probability)", "flashinfer")
def _(logits):
    sample, seed = flashinfer("sampling_from_logits"), seeds(logits.device)
    return lambda: sample(logits, **seed)


@peer("linear_sample_tokens", "product, then FlashInfer sampling (no probability)", "flashinfer")
def _(hidden, weight):
    sample, seed = flashinfer("sampling_from_logits"), seeds(hidden.device)
    return lambda: sample(hidden @ weight.t(), **seed)


def register_draws(ending: str, deterministic: bool) -> None:
    def name(text: str) -> str:
        return f"FlashInfer {text} (no probability{ending})"

    @peer("sample_tokens", f"FlashInfer softmax, sampling_from_probs, gather{ending}", "flashinfer")
    def _(logits):
        softmax, sample = flashinfer("softmax"), flashinfer("sampling_from_probs")
        seed = seeds(logits.device)

        def run():
            probability = softmax(logits)
            token = sample(probability, deterministic=deterministic, **seed).long()
            return token, probability.gather(-1, token.unsqueeze(-1))

        return run

    @peer("sample_top_k", name("top_k_top_p_sampling_from_logits"), "flashinfer")
    def _(logits, options):
        sample, seed = flashinfer("top_k_top_p_sampling_from_logits"), seeds(logits.device)
        return lambda: sample(logits, options["top_k"], 1.0, deterministic=deterministic, **seed)

    @peer("sample_top_k", name("softmax, top_k_sampling_from_probs"), "flashinfer")
    def _(logits, options):
        softmax, sample = flashinfer("softmax"), flashinfer("top_k_sampling_from_probs")
        seed, k = seeds(logits.device), options["top_k"]
        return lambda: sample(softmax(logits), k, deterministic=deterministic, **seed)

    @peer("sample_top_p", name("softmax, top_p_sampling_from_probs"), "flashinfer")
    def _(logits, options):
        softmax, sample = flashinfer("softmax"), flashinfer("top_p_sampling_from_probs")
        seed, p = seeds(logits.device), options["top_p"]
        return lambda: sample(softmax(logits), p, deterministic=deterministic, **seed)

    # No function of FlashInfer has all three filters. This is what its top_k_top_p_sampling does at
    # so small a k, its top_k and then the rest among those tokens, with min_p after top_p
    @peer("sample_filtered", name("top_k, top_p_renorm, min_p_sampling of k"), "flashinfer")
    def _(logits, options):
        top_k = import_module("flashinfer.topk").top_k
        renorm, sample = flashinfer("top_p_renorm_probs"), flashinfer("min_p_sampling_from_probs")
        seed, k, p, least = seeds(logits.device), *(options[x] for x in ("top_k", "top_p", "min_p"))

        def run():
            values, ids = top_k(logits, k, sorted=True, deterministic=deterministic)
            kept = renorm(torch.softmax(values.float(), dim=-1), p)
            place = sample(kept, least, deterministic=deterministic, **seed)
            return ids.gather(-1, place.long().unsqueeze(-1)).squeeze(-1)

        return run

    @peer("sample_top_k_top_p", name("top_k_top_p_sampling_from_logits"), "flashinfer")
    def _(logits, options):
        sample, seed = flashinfer("top_k_top_p_sampling_from_logits"), seeds(logits.device)
        k, p = options["top_k"], options["top_p"]
        return lambda: sample(logits, k, p, deterministic=deterministic, **seed)

    # As vLLM calls it, with a k and a p for each row, which takes another path inside
    @peer("sample_top_k_top_p", name("top_k_top_p_sampling, options by row"), "flashinfer")
    def _(logits, options):
        sample, seed = flashinfer("top_k_top_p_sampling_from_logits"), seeds(logits.device)
        k = torch.full((len(logits),), options["top_k"], dtype=torch.int32, device=logits.device)
        p = torch.full((len(logits),), options["top_p"], device=logits.device)
        return lambda: sample(logits, k, p, deterministic=deterministic, **seed)


register_draws("", True)
register_draws(", not deterministic", False)


def both_passes(loss: Callable, leaves: list[torch.Tensor], *more: torch.Tensor) -> Callable:
    """Forward and backward of both passes; the gradients of leaves and of `more`."""
    return lambda: torch.autograd.grad(sum(loss(x) for x in leaves), [*leaves, *more])


@peer("oput_loss", "Liger cross_entropy", "liger_kernel")
def _(masked, predicted, target):
    loss = liger("cross_entropy")
    # Overwrites the logits with their gradients, hence the copies: later repetitions read those,
    # which costs the same
    leaves = [x.detach().clone().requires_grad_() for x in (masked, predicted)]
    return both_passes(lambda x: loss(x, target), leaves)


@peer("oput_loss", f"{QUACK_NAME} cross_entropy", QUACK)
def _(masked, predicted, target):
    loss = quack("cross_entropy")
    return both_passes(lambda x: loss(x, target), [masked, predicted])


@peer("oput_loss_and_grad_", "Liger cross_entropy, forward alone", "liger_kernel")
def _(masked, predicted, target, weight):
    loss = liger("cross_entropy")

    def run():  # the gradients are in the logits when the loss is there
        leaves = [x.detach().requires_grad_() for x in (masked, predicted)]
        for x in leaves:
            loss(x, target)
        return [x.detach() for x in leaves]

    return run


def times_weight(found, weight, **_):
    return [x * weight.unsqueeze(-1) for x in found]


@peer(
    "oput_loss_and_grad_",
    f"{QUACK_NAME} cross_entropy_fwd with dx, in place (unweighted)",
    QUACK,
    as_eager=times_weight,
)
def _(masked, predicted, target, weight):
    forward = quack("cross_entropy_fwd")

    def run():
        for x in (masked, predicted):
            forward(x, target, return_dx=True, inplace_backward=True)
        return [masked, predicted]

    return run


# One call on both passes' hidden states reads the head and makes its gradient once: what a user of
# these packages would write. The sum of two means is twice the mean of all


def both_at_once(loss: Callable, masked, predicted, weight, target) -> Callable:
    def run():
        mean = loss(torch.cat([masked, predicted]), weight, torch.cat([target, target]))
        return torch.autograd.grad(2 * mean, [masked, predicted, weight])

    return run


def register_linear(name: str, package: str, load: Callable[[], Callable]) -> None:
    @peer("linear_oput_loss", f"{name}, both passes at once", package)
    def _(**given):
        return both_at_once(load(), **given)


def with_options(loss: Callable, **options: Any) -> Callable:
    return lambda hidden, weight, target: loss(hidden, weight, target, **options)


def cut_cross_entropy(**options: Any) -> Callable:
    return with_options(import_module("cut_cross_entropy").linear_cross_entropy, **options)


def quack_linear() -> Callable:
    return import_module("quack.linear_cross_entropy").chunked_linear_cross_entropy


register_linear(
    "Liger fused_linear_cross_entropy",
    "liger_kernel",
    lambda: liger("fused_linear_cross_entropy"),
)
# By default the head's gradient is added up in bfloat16, chunk after chunk
register_linear(
    "Liger fused_linear_cross_entropy, float32 sums, chunks 16 times as large",
    "liger_kernel",
    lambda: with_options(
        liger("fused_linear_cross_entropy"), accum_dtype=torch.float32, chunk_mem_const=16
    ),
)
register_linear("QuACK chunked_linear_cross_entropy", "quack", quack_linear)
register_linear(
    "cut-cross-entropy, small gradients left out", "cut_cross_entropy", cut_cross_entropy
)
register_linear(
    "cut-cross-entropy, every gradient",
    "cut_cross_entropy",
    lambda: cut_cross_entropy(filter_eps=None),
)


@peer("linear_oput_loss", "QuACK chunked_linear_cross_entropy", "quack")
def _(masked, predicted, weight, target):
    loss = quack_linear()
    return both_passes(lambda x: loss(x, weight, target), [masked, predicted], weight)
