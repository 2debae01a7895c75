"""Log-probabilities of given tokens, their ranks, and the most likely tokens beside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dmax_kernels.ops._register import register_autograd, register_fake
from dmax_kernels.vocabulary import allowed_tokens, visible_rows


class TokenLogprobs(NamedTuple):
    """What :func:`token_logprobs` returns."""

    logprob: Tensor
    rank: Tensor
    top_ids: Tensor
    top_logprobs: Tensor


def token_logprobs(
    logits: Tensor,
    ids: Tensor,
    *,
    temperature: float = 1.0,
    top_n: int = 0,
    ignore_index: int = -100,
    suppress_tokens: Sequence[int] = (),
    allowed: Tensor | None = None,
    vocab_limit: int | None = None,
) -> TokenLogprobs:
    """What an engine reports of a prompt's or of a sampled token: ``logprobs=n``.

    With ``x = logits / temperature``::

        logprob[i] = x[ids[i]] - log sum_v exp(x_v)
        rank[i]    = |{v before ids[i]}|, in the order x descending, then id ascending
        top_ids    = the first top_n ids of that order, top_logprobs their log-probabilities

    The softmax is never stored. The CUDA kernels read the logits once; the Triton kernels read them
    a second time for ``top_n``, and the CPU counts ranks in a row that is still in its cache. Rank
    0 is the most likely token; vLLM's ranks start at 1.

    This is for reports and for scores. Training that needs the entropy and its gradient, or whether
    the arg-max is the target, takes :func:`target_logprobs`.

    Args:
        logits: [..., V], float32, bfloat16 or float16, any strides.
        ids: int64 or int32, one per row, [...], or several, [..., n] with n >= 1. ``ignore_index``
            marks a place without a token: log-probability 0, rank -1, gradient 0. Another id
            outside [0, V) is an error on the CPU; on the GPU its log-probability is NaN and its
            rank -1.
        temperature: 1e-30 to 1e30; it changes no rank.
        top_n: 0 to 20, at most V.
        suppress_tokens, allowed, vocab_limit: which tokens count, as in
            :func:`dmax_kernels.top1_confidence`. The others do as if their logits were -inf: their
            log-probabilities are -inf, their gradients 0.

    Returns:
        A named tuple :class:`TokenLogprobs`: logprob float32 and rank int64 of ids' shape, top_ids
        int64 and top_logprobs float32 [..., top_n]. ``logprob`` is differentiable once in the
        logits, ``sum_i grad_i (onehot(ids[i]) - softmax(x)) / temperature`` over a row's ids; the
        others are not.
        A row with a NaN, with +inf or with nothing but -inf has no softmax: all of its
        log-probabilities are NaN. Its ranks and top_ids are defined: NaN comes before all numbers.

    Raises:
        RuntimeError: wrong dtypes, shapes or devices, options out of range, or (CPU) an id out of
            range.
        ValueError: suppress_tokens or a vocab_limit out of range.
    """
    logits, _, allowed = visible_rows(
        "token_logprobs", logits, -1, suppress_tokens, allowed, vocab_limit, as_mask=True
    )
    logprob, rank, top_ids, top_logprobs, _ = torch.ops.dmax.token_logprobs(
        logits, ids, temperature=temperature, top_n=top_n, ignore_index=ignore_index,
        allowed=allowed,
    )  # fmt: skip
    return TokenLogprobs(logprob, rank, top_ids, top_logprobs)


def empty_logprobs(rows: Tensor, ids: Tensor, top_n: int) -> tuple[Tensor, ...]:
    """The op's results for rows [..., V or D]."""
    lists = (*rows.shape[:-1], top_n)
    return (
        rows.new_empty(ids.shape, dtype=torch.float32),
        rows.new_empty(ids.shape, dtype=torch.int64),
        rows.new_empty(lists, dtype=torch.int64),
        rows.new_empty(lists, dtype=torch.float32),
        rows.new_empty(rows.shape[:-1], dtype=torch.float32),
    )


@register_fake("token_logprobs")
def _(logits, ids, *, temperature=1.0, top_n=0, ignore_index=-100, allowed=None):
    return empty_logprobs(logits, ids, top_n)


def _setup_context(ctx, inputs, options, output):
    logits, ids = inputs
    _, rank, top_ids, top_logprobs, logsumexp = output
    ctx.options = {name: options[name] for name in ("ignore_index", "temperature")}
    ctx.mark_non_differentiable(rank, top_ids, top_logprobs, logsumexp)
    ctx.save_for_backward(logits, ids, logsumexp, options["allowed"])


def _backward(ctx, grad_logprob, *_):
    logits, ids, logsumexp, allowed = ctx.saved_tensors
    if ids.dim() == logits.dim():
        grad = gradient_of_several(grad_logprob, logits, ids, logsumexp, **ctx.options)
    else:  # the loss of a token is minus its log-probability
        grad = torch.ops.dmax.oput_loss_backward(
            -grad_logprob, logits, ids, logsumexp, **ctx.options
        )
    if allowed is not None:
        grad = grad.masked_fill(~allowed_tokens(allowed, logits.shape[-1]), 0.0)
    return grad, None


def gradient_of_several(
    grad: Tensor, logits: Tensor, ids: Tensor, logsumexp: Tensor, ignore_index: int,
    temperature: float, first: int = 0, vocab: int | None = None,
) -> Tensor:  # fmt: skip
    """Of a row's logits, or of the columns of ``vocab`` that begin with the id ``first``.

    All of it but the ids is the gradient of one of them at the sum of all gradients; what that is
    at the ids, some of which may be equal, replaces it and is also rounded once.
    """
    width = logits.shape[-1]
    ids = ids.long()
    used = ids != ignore_index
    outside = used & ((ids < 0) | (ids >= (width if vocab is None else vocab)))  # on a GPU
    logsumexp = logsumexp.masked_fill(outside.any(dim=-1), torch.nan)
    ignored = ~used.any(dim=-1)
    grad = torch.where(used, grad, 0.0)
    total = grad.sum(dim=-1)
    ids = ids - first
    # Where an id is not among the columns, column 0 gets its own value
    places = torch.where(used & (ids >= 0) & (ids < width), ids, 0)
    result = torch.ops.dmax.oput_loss_backward(
        -total, logits, torch.where(ignored, -1, places[..., 0]), logsumexp.float(),
        ignore_index=-1, temperature=temperature,
    )  # fmt: skip
    of_place = torch.zeros_like(grad)
    for i in range(ids.shape[-1]):
        of_place += torch.where(places == ids[..., i : i + 1], grad[..., i : i + 1], 0.0)
    log_p = logits.gather(-1, places).double() / temperature - logsumexp.unsqueeze(-1)
    # 1 - p without cancellation, where one id has the whole of the gradient
    total = total.unsqueeze(-1)
    value = (of_place - total - total * torch.expm1(log_p)) / temperature
    value = value.masked_fill(ignored.unsqueeze(-1), 0.0)
    return result.scatter_(-1, places, value.to(result.dtype))


register_autograd("token_logprobs", _backward, _setup_context)
