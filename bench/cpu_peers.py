"""What an expert would write on a CPU in place of each op: the candidates ours must not lose to.

Eager PyTorch that reads the logits as few times as its functions allow (argmax and logsumexp, not
softmax and then max), the same compiled by torch.compile with static shapes, numpy, and, for rules
that draw, llama.cpp's worker. All give the op's results to the precision of their dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

import dmax_kernels
from dmax_kernels.bench.decoding import stack_columns
from dmax_kernels.bench.workload import Work


@dataclass(frozen=True)
class CpuPeer:
    workload: str
    name: str
    function: Callable
    compiled: bool
    call: Callable  # (function, given) -> the candidate


CPU_PEERS: list[CpuPeer] = []


def direct(function: Callable, given: dict[str, Any]) -> Callable[[], object]:
    return lambda: function(**given)


def expert(workload: str, name: str, *, compiled: bool = False, call: Callable = direct):
    """Registers a function of the workload's `given`; `compiled`: by torch.compile, besides."""

    def register(function: Callable) -> Callable:
        CPU_PEERS.append(CpuPeer(workload, name, function, compiled, call))
        return function

    return register


def add_cpu_peers(work: Work, workload: str, *, compiled: bool) -> None:
    """Puts them among the candidates; the timer names those that fail."""
    for peer in (each for each in CPU_PEERS if each.workload == workload):
        work.candidates[peer.name] = peer.call(peer.function, work.given)
        if compiled and peer.compiled:
            function = torch.compile(peer.function, dynamic=False)
            work.candidates[f"torch.compile of {peer.name}"] = peer.call(function, work.given)


# ---- rows of logits ----


@expert("top1_confidence", "argmax and logsumexp", compiled=True)
def argmax_and_logsumexp(logits):
    token = logits.argmax(dim=-1, keepdim=True)
    log_sum = logits.float().logsumexp(dim=-1, keepdim=True)
    confidence = (logits.gather(-1, token).float() - log_sum).exp()
    return token.squeeze(-1), confidence.squeeze(-1)


@expert("top1_confidence", "max, and the sum of exponentials")
def _(logits):
    largest, token = logits.max(dim=-1, keepdim=True)
    shifted = logits.float() - largest.float()
    return token.squeeze(-1), shifted.exp_().sum(dim=-1).reciprocal_()


@expert("top1_confidence", "numpy argmax, torch softmax")
def _(logits):
    token = torch.from_numpy(logits.float().numpy().argmax(axis=-1))
    probability = torch.softmax(logits, dim=-1, dtype=torch.float32)
    return token, probability.gather(-1, token.unsqueeze(-1)).squeeze(-1)


@expert("top1_confidence", "numpy")
def _(logits):
    x = logits.float().numpy()
    token = x.argmax(axis=-1)
    shifted = x - np.take_along_axis(x, token[:, None], axis=-1)
    total = np.exp(shifted, out=shifted).sum(axis=-1)
    return torch.from_numpy(token), torch.from_numpy(1 / total)


@expert("topk_confidence", "topk and logsumexp", compiled=True)
def _(logits, k):
    value, token = logits.topk(k, dim=-1)
    return token, (value.float() - logits.float().logsumexp(dim=-1, keepdim=True)).exp()


@expert("topk_confidence", "numpy argpartition")
def _(logits, k):
    x = logits.float().numpy()
    token = np.argpartition(x, -k, axis=-1)[:, -k:]
    value = np.take_along_axis(x, token, axis=-1)
    order = np.argsort(-value, axis=-1, kind="stable")
    token, value = (np.take_along_axis(each, order, axis=-1) for each in (token, value))
    shifted = x - value[:, :1]
    total = np.exp(shifted, out=shifted).sum(axis=-1, keepdims=True)
    return torch.from_numpy(token), torch.from_numpy(np.exp(value - value[:, :1]) / total)


@expert("row_statistics", "topk and one exponential", compiled=True)
def statistics(logits):
    x = logits.float()
    (first, second), token = x.topk(2, dim=-1).values.unbind(-1), x.argmax(dim=-1)
    shifted = x - first.unsqueeze(-1)
    weight = shifted.exp()
    total = weight.sum(dim=-1)
    entropy = total.log() - (weight * shifted).sum(dim=-1) / total
    runner_up = (second - first).exp() / total
    return token, 1 / total, runner_up, entropy, first + total.log()


@expert("row_statistics", "numpy")
def numpy_statistics(logits):
    x = logits.float().numpy()
    token = x.argmax(axis=-1)
    pair = np.partition(x, -2, axis=-1)[:, -2:]
    first = pair[:, 1:]
    shifted = x - first
    weight = np.exp(shifted)
    total = weight.sum(axis=-1)
    entropy = np.log(total) - np.einsum("rv,rv->r", weight, shifted) / total
    runner_up = np.exp(pair[:, 0] - pair[:, 1]) / total
    found = (token, 1 / total, runner_up, entropy, first[:, 0] + np.log(total))
    return tuple(map(torch.from_numpy, found))


# ---- draws ----


@expert("sample_tokens", "Gumbel noise", compiled=True)
def gumbel_sample(logits):
    x = logits.float()
    noise = torch.empty_like(x).exponential_().log_()
    token = (x - noise).argmax(dim=-1, keepdim=True)
    probability = (x.gather(-1, token) - x.logsumexp(dim=-1, keepdim=True)).exp()
    return token.squeeze(-1), probability.squeeze(-1)


@expert("sample_tokens", "softmax and multinomial")
def _(logits):
    probability = torch.softmax(logits, dim=-1, dtype=torch.float32)
    token = torch.multinomial(probability, 1)
    return token.squeeze(-1), probability.gather(-1, token).squeeze(-1)


@expert("sample_tokens", "softmax and cumulative sum", compiled=True)
def cumulative_sample(logits):
    probability = torch.softmax(logits, dim=-1, dtype=torch.float32)
    cumulative = probability.cumsum(dim=-1)
    mark = torch.rand(len(logits), 1) * cumulative[:, -1:]
    token = torch.searchsorted(cumulative, mark, right=True).clamp(max=logits.shape[-1] - 1)
    return token.squeeze(-1), probability.gather(-1, token).squeeze(-1)


@expert("sample_tokens", "numpy cumulative sum")
def _(logits):
    x = logits.float().numpy()
    weight = np.exp(x - x.max(axis=-1, keepdims=True))
    cumulative = weight.cumsum(axis=-1)
    total, last = cumulative[:, -1], x.shape[-1] - 1
    marks = np.random.random_sample(len(x)) * total
    pairs = zip(cumulative, marks, strict=True)
    token = [min(row.searchsorted(mark, "right"), last) for row, mark in pairs]
    probability = weight[np.arange(len(x)), token] / total
    return torch.tensor(token), torch.from_numpy(probability)


@expert("draw_with_entropy", "one exponential and Gumbel noise", compiled=True)
def _(logits):
    x = logits.float()
    noise = torch.empty_like(x).exponential_().log_()
    token, _, _, entropy, _ = statistics(logits)
    return token, (x - noise).argmax(dim=-1), entropy


@expert("draw_with_entropy", "llama.cpp's entropy-bound worker, restated")
def _(logits):
    from bench.entropy_bound_worker import run

    return run(logits.float(), torch.rand(len(logits)), torch.get_num_threads())


@expert("top1_partial", "argmax and logsumexp", compiled=True)
def _(shards):
    largest, log_sum, token = stack_columns([shard_top1(*each) for each in shards])
    winner = largest.argmax(dim=0, keepdim=True)
    confidence = (largest.gather(0, winner)[0] - log_sum.logsumexp(dim=0)).exp()
    return token.gather(0, winner)[0], confidence


def shard_top1(part, start):
    token = part.argmax(dim=-1, keepdim=True)
    largest = part.gather(-1, token).float()
    return largest.squeeze(-1), part.float().logsumexp(dim=-1), token.squeeze(-1) + start


@expert("sample_partial", "Gumbel noise", compiled=True)
def _(shards):
    score, log_sum, token, logit = stack_columns([shard_draw(*each) for each in shards])
    winner = score.argmax(dim=0, keepdim=True)
    probability = (logit.gather(0, winner)[0] - log_sum.logsumexp(dim=0)).exp()
    return token.gather(0, winner)[0], probability


def shard_draw(part, start):
    x = part.float()
    perturbed = x - torch.empty_like(x).exponential_().log_()
    score, token = perturbed.max(dim=-1, keepdim=True)
    logit = x.gather(-1, token)
    return score[:, 0], x.logsumexp(dim=-1), token[:, 0] + start, logit[:, 0]


# ---- promotion, embeddings, the step ----


@expert("prefix_promote", "cumulative product", compiled=True)
def promote(confidence, masked, threshold):
    passes = (confidence > threshold) | ~masked
    prefix = masked & passes.cumprod(dim=-1).bool()
    first = masked & (masked.cumsum(dim=-1) == 1)
    return torch.where(prefix.any(dim=-1, keepdim=True), prefix, first)


@expert("prefix_promote", "numpy")
def _(confidence, masked, threshold):
    confidence, masked = confidence.numpy(), masked.numpy()
    prefix = masked & np.logical_and.accumulate((confidence > threshold) | ~masked, axis=-1)
    first = masked & (masked.cumsum(axis=-1) == 1)
    return torch.from_numpy(np.where(prefix.any(axis=-1, keepdims=True), prefix, first))


@expert("hybrid_embedding", "lerp of gathered rows", compiled=True)
def hybrid(embedding, token, confidence, masked, mask_token_id):
    mask_row = embedding[mask_token_id].float()
    rows, share = F.embedding(token, embedding).float(), confidence.unsqueeze(-1)
    mix = torch.lerp(mask_row, rows, share)
    norm = torch.lerp(mask_row.norm(), rows.norm(dim=-1, keepdim=True), share)
    mix = mix * (norm / mix.norm(dim=-1, keepdim=True))
    return torch.where(masked.unsqueeze(-1), mask_row, mix).to(embedding.dtype)


@expert("hybrid_embedding", "lerp of the rows that are tokens")
def _(embedding, token, confidence, masked, mask_token_id):
    out = embedding[mask_token_id].repeat(len(token), 1)
    live = (~masked).nonzero().squeeze(-1)
    some = torch.zeros(len(live), dtype=torch.bool)
    out[live] = hybrid(embedding, token[live], confidence[live], some, mask_token_id)
    return out


def gradient_of_embedding(function, given):
    forward = {name: value for name, value in given.items() if name != "grad"}
    return lambda: torch.autograd.grad(function(**forward), given["embedding"], given["grad"])


expert(
    "hybrid_embedding_backward", "lerp of gathered rows", compiled=True, call=gradient_of_embedding
)(hybrid)


@expert("spd_step_", "argmax and logsumexp, the rules on small tensors", compiled=True)
def _(
    logits, embedding, editable, masked, token, confidence, converged, step, inputs_embeds,
    mask_token_id, tau_dec, tau_acc,
):  # fmt: skip
    y, c = argmax_and_logsumexp(logits)
    repeated = (y == token) & ~masked
    stable = (step >= 1) & (repeated | ~editable).all(dim=-1)
    done = stable | ((c > tau_acc) | ~editable).all(dim=-1)
    next_masked = masked & ~promote(c, masked, tau_dec) & ~done.unsqueeze(-1)
    next_token = torch.where(editable, y, token)
    mixed = hybrid(embedding, y, c, next_masked, mask_token_id)
    embeds = torch.where((editable | next_masked).unsqueeze(-1), mixed, embedding[next_token])
    active = ~converged.unsqueeze(-1)
    inputs_embeds.copy_(torch.where(active.unsqueeze(-1), embeds, inputs_embeds))
    token.copy_(torch.where(active, next_token, token))
    confidence.copy_(torch.where(active & editable, c, confidence))
    masked.copy_(torch.where(active, next_masked, masked))
    step.add_((~converged).to(step.dtype))
    converged.logical_or_(done)


# ---- with a matrix product ----


@expert("linear_top1_confidence", "F.linear, argmax and logsumexp", compiled=True)
def _(hidden, weight):
    return argmax_and_logsumexp(F.linear(hidden, weight))


@expert("linear_sample_tokens", "F.linear and Gumbel noise", compiled=True)
def _(hidden, weight):
    return gumbel_sample(F.linear(hidden, weight))


@expert("linear_sample_tokens", "F.linear, softmax and cumulative sum")
def _(hidden, weight):
    return cumulative_sample(F.linear(hidden, weight))


# ---- training ----


def gradients_of(*names):
    def call(function, given):
        leaves = [given[name] for name in names]
        return lambda: torch.autograd.grad(function(**given), leaves)

    return call


@expert("oput_loss", "cross_entropy", compiled=True, call=gradients_of("masked", "predicted"))
def _(masked, predicted, target):
    return F.cross_entropy(masked, target) + F.cross_entropy(predicted, target)


@expert("oput_loss", "softmax minus one-hot")
def _(masked, predicted, target):
    return [softmax_minus_one_hot(x.detach(), target)[1] for x in (masked, predicted)]


def softmax_minus_one_hot(logits, target):
    """Of one pass: its losses and the gradient of their mean."""
    log_probability = logits.log_softmax(dim=-1, dtype=torch.float32)
    place = target.unsqueeze(-1)
    losses = -log_probability.gather(-1, place).squeeze(-1)
    grad = log_probability.exp_()
    grad.scatter_add_(-1, place, grad.new_full(place.shape, -1.0))
    return losses, grad.div_(len(target)).to(logits.dtype)


@expert("oput_loss_and_grad_", "softmax minus one-hot")
def _(masked, predicted, target, weight):
    found = []
    for x in (masked, predicted):
        losses, grad = softmax_minus_one_hot(x, target)
        x.copy_(grad)  # every weight is 1 / len(target)
        found.append(losses)
    return found


HEAD = gradients_of("masked", "predicted", "weight")


@expert("linear_oput_loss", "one concatenated pass", compiled=True, call=HEAD)
def _(masked, predicted, weight, target):
    logits = F.linear(torch.cat([masked, predicted]), weight)
    return 2 * F.cross_entropy(logits.float(), target.repeat(2))


@expert("linear_oput_loss", "products, then oput_loss", call=HEAD)
def _(masked, predicted, weight, target):
    logits = F.linear(torch.cat([masked, predicted]), weight).chunk(2)
    return dmax_kernels.oput_loss(*logits, target, reduction="mean")
