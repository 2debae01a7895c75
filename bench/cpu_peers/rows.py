"""Peers over rows of logits: the top-1, the top-k, the log-probabilities, the statistics."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from bench.cpu_peers.registry import expert
from dmax_kernels.bench.decoding import stack_columns


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


@expert("token_logprobs", "logsumexp, a comparison and topk", compiled=True)
def _(logits, ids, top_n):
    value = logits.gather(-1, ids.unsqueeze(-1))
    log_sum = logits.float().logsumexp(dim=-1, keepdim=True)
    top, top_ids = logits.topk(top_n, dim=-1)
    rank = (logits > value).sum(dim=-1)
    return (value.float() - log_sum).squeeze(-1), rank, top_ids, top.float() - log_sum


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


@expert("linear_top1_confidence", "F.linear, argmax and logsumexp", compiled=True)
def _(hidden, weight):
    return argmax_and_logsumexp(F.linear(hidden, weight))
