"""Peers for draws from rows of logits."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from bench.cpu_peers import entropy_bound_worker
from bench.cpu_peers.registry import expert
from bench.cpu_peers.rows import statistics
from dmax_kernels.bench.decoding import stack_columns
from dmax_kernels.vocabulary import allowed_tokens


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


@expert("sample_top_k", "topk and softmax of its values", compiled=True)
@expert("sample_filtered", "topk, then every filter on its values", compiled=True)
def filters_on_topk(logits, options):
    """Exact without a sort: no filter after top_k needs another token."""
    value, place = torch.topk(logits.float(), min(options["top_k"], logits.shape[-1]))
    return draw_of_ordered(value, place, None, options)


@expert("sample_top_p", "sort")
def _(logits, options):
    return draw_of_ordered(*logits.float().sort(dim=-1, descending=True), None, options)


@expert("sample_top_p", "topk, and sort where it does not reach top_p")
def _(logits, options):
    """Exact, and fast where 1,024 tokens hold the mass."""
    x = logits.float()
    value, place = torch.topk(x, min(1024, x.shape[-1]))
    total = torch.logsumexp(x, dim=-1, keepdim=True)
    if ((value - total).exp().sum(dim=-1) < options["top_p"]).any():
        value, place = x.sort(dim=-1, descending=True)
    return draw_of_ordered(value, place, total, options)


def draw_of_ordered(value, place, total, options):
    """A draw from logits in descending order. top_p is a share of exp(total), None: of these."""
    weight = torch.softmax(value, dim=-1) if total is None else (value - total).exp()
    before = weight.cumsum(dim=-1) - weight
    dropped = before >= options.get("top_p", 1.0)
    dropped |= weight < options.get("min_p", 0.0) * weight[:, :1]
    weight = weight.masked_fill(dropped, 0.0)
    cumulative = weight.cumsum(dim=-1)
    mark = torch.rand(len(value), 1) * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, mark, right=True).clamp(max=value.shape[-1] - 1)
    probability = weight.gather(-1, drawn) / cumulative[:, -1:]
    return place.gather(-1, drawn).squeeze(-1), probability.squeeze(-1)


@expert("draw_with_entropy", "one exponential and Gumbel noise", compiled=True)
def _(logits):
    x = logits.float()
    noise = torch.empty_like(x).exponential_().log_()
    token, _, _, entropy, _ = statistics(logits)
    return token, (x - noise).argmax(dim=-1), entropy


@expert("draw_with_entropy", "llama.cpp's entropy-bound worker, restated")
def _(logits):
    return entropy_bound_worker.run(
        logits.float(), torch.rand(len(logits)), torch.get_num_threads()
    )


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


@expert("linear_sample_tokens", "F.linear and Gumbel noise", compiled=True)
def _(hidden, weight):
    return gumbel_sample(F.linear(hidden, weight))


@expert("linear_sample_tokens", "F.linear, softmax and cumulative sum")
def _(hidden, weight):
    return cumulative_sample(F.linear(hidden, weight))


@expert("penalties", "gather, change, scatter")
@expert("transform_logits_", "in place, then gather, change, scatter")
def _(logits, options):
    """Only the columns that have occurred, which are the same for all rows."""
    x, counts = logits, options["output_counts"]
    if "softcap" in options:
        x = x.float().div_(options["softcap"]).tanh_().mul_(options["softcap"])
        x += options["bias"]
    seen = (counts > 0) | allowed_tokens(options["prompt_tokens"], len(counts))
    places = seen.nonzero().squeeze(-1)
    column, count = x[:, places].float(), counts[places]
    r = options["repetition_penalty"]
    column = torch.where(column > 0, column / r, column * r)
    column -= options["frequency_penalty"] * count + options["presence_penalty"] * (count > 0)
    x[:, places] = column.to(x.dtype)
    return logits if x is logits else logits.copy_(x)
