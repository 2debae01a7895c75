"""Tokens and losses from hidden states and the LM head: the logits are never stored as a whole."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dmax_kernels.ops import _linear_logprobs_autograd, _linear_loss_autograd
from dmax_kernels.ops._register import (
    empty_per_row,
    register_autograd,
    register_fake,
    register_not_differentiable,
)
from dmax_kernels.ops.logprobs import TokenLogprobs, empty_logprobs
from dmax_kernels.ops.sample import Sample, empty_sample, row_options
from dmax_kernels.reduction import (
    autocast_operands,
    check_reduction,
    reduce_loss,
    token_factors,
)
from dmax_kernels.vocabulary import visible_head


def linear_top1_confidence(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float = 1.0,
    suppress_token: int = -1,
    suppress_tokens: Sequence[int] = (),
    allowed: Tensor | None = None,
    vocab_limit: int | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`dmax_kernels.top1_confidence` of ``hidden @ weight.T + bias`` (Algorithm 1, line 4).

    ``x = hidden @ weight.T + bias``, ``token = argmax_v x_v``,
    ``confidence = softmax(x / temperature)[token]``. The products of the inputs' dtype are summed
    in float32 and the logits stay float32: a 16-bit LM head rounds them, so its ids may differ
    where two logits round to the same number. Memory beside the results, whatever V: on the GPU
    below 8 MB with 16-bit inputs and 100 MB with float32 or a mask; on the CPU at D = 2,048 below
    5 MB, and 1 MB per thread.

    Args:
        hidden: [..., D], float32, bfloat16 or float16. Pass only the rows you need.
        weight: [V, D], the LM head, in hidden's dtype.
        bias: [V] in hidden's dtype, or None.
        temperature, suppress_token, suppress_tokens, allowed, vocab_limit: as in
            :func:`dmax_kernels.top1_confidence`.

    Returns:
        token int64 [...] and confidence float32 [...]; ties, NaN and infinities as in
        :func:`dmax_kernels.top1_confidence`. Repeated calls give the same bits. On the CPU,
        up to 8 rows have the bits of each row alone; beyond, and on the GPU, a different number of
        rows may change the order of summation within the matrix product.

    Raises:
        RuntimeError: dtypes or shapes that do not fit, a temperature or token id out of range.
        ValueError: suppress_tokens or a vocab_limit out of range.
    """
    weight, bias, suppress_token, allowed = visible_head(
        "linear_top1_confidence", weight, bias, suppress_token, suppress_tokens, allowed,
        vocab_limit,
    )  # fmt: skip
    return torch.ops.dmax.linear_top1_confidence(
        hidden, weight, bias, temperature=temperature, suppress_token=suppress_token,
        allowed=allowed,
    )  # fmt: skip


@register_fake("linear_top1_confidence")
def _(hidden, weight, bias=None, *, temperature=1.0, suppress_token=-1, allowed=None):
    return empty_per_row(hidden, torch.int64, torch.float32)


register_not_differentiable("linear_top1_confidence", "detach the hidden states and the weight")


def linear_sample_tokens(
    hidden: Tensor,
    weight: Tensor,
    seed: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    suppress_token: int = -1,
    suppress_tokens: Sequence[int] = (),
    allowed: Tensor | None = None,
    vocab_limit: int | None = None,
) -> Sample:
    """:func:`dmax_kernels.sample_tokens` of ``hidden @ weight.T + bias`` (Eq. 3's rollout).

    The noise is keyed by (seed, offset, row, id) as there, so that a sample depends neither on how
    the product is tiled nor, with a seed per row, on which other rows are asked for: pass
    ``hidden[masked]`` to draw for the masked positions alone. Logits are float32, as in
    :func:`dmax_kernels.linear_top1_confidence`. They are not stored, except where a filter is on:
    then those of a few rows at a time are, in at most 64 MB on the CPU.

    Args:
        hidden: [..., D], float32, bfloat16 or float16.
        weight: [V, D], the LM head, in hidden's dtype.
        seed: int64 on hidden's device, [2] or [..., 2], as in :func:`dmax_kernels.sample_tokens`.
        bias: [V] in hidden's dtype, or None.
        temperature, top_k, top_p, min_p, suppress_token, suppress_tokens, allowed, vocab_limit: as
            in :func:`dmax_kernels.sample_tokens`. Greedy is
            :func:`dmax_kernels.linear_top1_confidence` at temperature 1.

    Returns:
        token, probability, top1_probability and relative_confidence [...], as
        :func:`dmax_kernels.sample_tokens`.

    Raises:
        RuntimeError: dtypes or shapes that do not fit, an option or token id out of range.
        ValueError: as :func:`dmax_kernels.sample_tokens`.
    """
    op = "linear_sample_tokens"
    weight, bias, suppress_token, allowed = visible_head(
        op, weight, bias, suppress_token, suppress_tokens, allowed, vocab_limit
    )
    options = row_options(
        op, "hidden", hidden, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p
    )
    return Sample(
        *torch.ops.dmax.linear_sample_tokens(
            hidden, weight, seed, bias, **options, suppress_token=suppress_token, allowed=allowed
        )
    )


@register_fake("linear_sample_tokens")
def _(hidden, weight, seed, bias=None, **options):
    return empty_sample(hidden)


register_not_differentiable("linear_sample_tokens", "detach the hidden states and the weight")


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float = 1.0,
    top_n: int = 0,
    ignore_index: int = -100,
    suppress_tokens: Sequence[int] = (),
    allowed: Tensor | None = None,
    vocab_limit: int | None = None,
) -> TokenLogprobs:
    """:func:`dmax_kernels.token_logprobs` of ``hidden @ weight.T + bias``.

    Logits are float32, as in :func:`dmax_kernels.linear_top1_confidence`. Those of some rows at a
    time are stored: on the CPU in 64 MB, on a GPU those of 64 rows. Training that needs neither
    ranks nor a mask takes :func:`dmax_kernels.linear_target_logprobs`.

    Args:
        hidden: [..., D], float32, bfloat16 or float16.
        weight: [V, D], the LM head, in hidden's dtype.
        ids: int64 or int32, one per row of hidden, [...], or several, [..., n].
        bias: [V] in hidden's dtype, or None.
        temperature, top_n, ignore_index, suppress_tokens, allowed, vocab_limit: as in
            :func:`dmax_kernels.token_logprobs`.

    Returns:
        logprob, rank, top_ids and top_logprobs, as :func:`dmax_kernels.token_logprobs`. With one id
        per row, ``logprob`` is differentiable once in hidden, weight and bias: the backward pass
        computes the logits again, a block of columns at a time, and sums in float32.

    Raises:
        RuntimeError: as :func:`dmax_kernels.token_logprobs`, or shapes that do not fit.
        ValueError: suppress_tokens or a vocab_limit out of range.
    """
    weight, bias, _, allowed = visible_head(
        "linear_token_logprobs", weight, bias, -1, suppress_tokens, allowed, vocab_limit,
        as_mask=True,
    )  # fmt: skip
    results = torch.ops.dmax.linear_token_logprobs(
        hidden, weight, ids, bias, temperature=temperature, top_n=top_n,
        ignore_index=ignore_index, allowed=allowed,
    )  # fmt: skip
    return TokenLogprobs(*results[:4])


@register_fake("linear_token_logprobs")
def _(hidden, weight, ids, bias=None, *, temperature=1.0, top_n=0, ignore_index=-100, allowed=None):
    return empty_logprobs(hidden, ids, top_n)


register_autograd(
    "linear_token_logprobs",
    _linear_logprobs_autograd.backward,
    _linear_logprobs_autograd.setup_context,
)


def linear_oput_loss(
    hidden_masked: Tensor | None,
    hidden_predicted: Tensor | None,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    temperature: float = 1.0,
    token_weight: Tensor | None = None,
    pass_weights: tuple[float, float] = (1.0, 1.0),
    reduction: str = "none",
    num_tokens: Tensor | float | None = None,
    by_pass: bool = False,
) -> Tensor | tuple[Tensor | None, Tensor | None]:
    """:func:`dmax_kernels.oput_loss` of ``hidden @ weight.T + bias`` of both passes (Eq. 6).

    Eq. 6 of the paper, jointly: ``loss = w_masked CE(masked) + w_predicted CE(predicted)``, per
    position and pass, with x = (h W^T + b) / T, T = ``temperature``, lse = log sum_v exp(x_v),
    s = ``label_smoothing``, z = ``z_loss``, and dy the gradient of h W^T + b::

        loss = (1 - s) (lse - x_target) + s (lse - mean(x)) + z lse^2
        dy   = grad [(1 + 2 z lse) softmax(x) - (1 - s) onehot(target) - s / V] / T
        dh = dy W,   dW = sum over positions of both passes of dy^T h,   db = sum of dy

    The logits of all rows are never stored. With ``reduction`` "sum" or "mean" the gradients are
    made together with the loss, in three products, and wait for the upstream gradient, a single
    factor. Four products remain for "none", for float16 (a loss scale comes with the upstream
    gradient and must reach small gradients before they are rounded), for a token_weight or
    num_tokens that needs a gradient, under torch.func, for a second backward pass over the same
    loss, and for rows beyond those whose logits are kept (16-bit on the CPU, all on the GPU).
    Products of the inputs' dtype are summed in float32, logits stay float32, and each gradient is
    accumulated in float32 over all blocks and rounded once; a reduced loss's is rounded once more
    where the upstream gradient is not a power of two. Repeated calls give the same bits (on the
    CPU: for one number of threads).

    Memory beside inputs and gradients, with R rows (both passes together). CPU: forward 2 KB D,
    and 1 KB D and 0.3 MB per thread; backward 8 R D bytes (16-bit inputs: 10 R D), 8 KB D and 2 MB.
    GPU: forward below 16 MB; backward R (10 D + 2 C) + 4 C D bytes, with a vocabulary chunk of
    C = 16,384 tokens (0.57 GB at R = 8,192, D = 2,048). A reduced loss takes both in its forward
    pass, and the logits that it keeps: at most V D bytes or 16 MiB on the CPU, 1 GiB on the GPU.
    Its gradients exist from then on. Eager took 7 R V bytes in bench/memory.py: 9 GB at R = 8,192.

    Args:
        hidden_masked, hidden_predicted: [..., D], float32, bfloat16 or float16, one shape and
            dtype; either may be None.
        weight: [V, D], the LM head, in hidden's dtype.
        target: int64 or int32 [...]; ``ignore_index`` rows read no hidden states and have loss and
            gradient 0. Another id outside [0, V) is an error on the CPU; on the GPU it makes that
            row's loss and gradients NaN.
        bias: [V] in hidden's dtype, or None.
        temperature, token_weight, pass_weights, reduction, num_tokens, by_pass: as in
            :func:`dmax_kernels.oput_loss`.

    Under autocast, hidden states, weight and bias are cast to autocast's dtype, as ``nn.Linear``
    casts them.

    Returns:
        As :func:`dmax_kernels.oput_loss`; differentiable once in both hiddens, weight and bias.

    Raises:
        ValueError: an unknown reduction, a token_weight of a different shape, a num_tokens that is
            no count or that comes with a reduction other than the mean, by_pass without a
            reduction.
        RuntimeError: wrong dtypes, shapes, devices, options or (CPU) targets.
    """
    hidden_masked, hidden_predicted, weight, bias = autocast_operands(
        hidden_masked, hidden_predicted, weight, bias
    )
    operands = (hidden_masked, hidden_predicted, weight, bias)
    options = {
        "ignore_index": ignore_index,
        "label_smoothing": label_smoothing,
        "z_loss": z_loss,
        "temperature": temperature,
    }
    if gradients_come_with_the_loss(operands, token_weight, reduction, num_tokens):
        check_reduction("linear_oput_loss", target, token_weight, reduction, num_tokens, by_pass)
        factors, empty = token_factors(
            target, ignore_index, token_weight, pass_weights, reduction, num_tokens
        )
        needed = ("needs_masked", "needs_predicted", "needs_weight", "needs_bias")
        needs = {
            name: t is not None and t.requires_grad
            for name, t in zip(needed, operands, strict=True)
        }
        total, addends, *_ = torch.ops.dmax.linear_oput_loss_sum(
            hidden_masked, hidden_predicted, weight, target, bias, *factors, **options, **needs
        )
        if empty is not None:
            total, addends = (each.masked_fill(empty, 0.0) for each in (total, addends))
        return (total, addends) if by_pass else total
    loss_masked, loss_predicted, _, _ = torch.ops.dmax.linear_oput_loss(
        hidden_masked, hidden_predicted, weight, target, bias, **options
    )
    losses = (
        None if hidden_masked is None else loss_masked,
        None if hidden_predicted is None else loss_predicted,
    )
    return reduce_loss(
        "linear_oput_loss", losses, target, ignore_index, token_weight, pass_weights, reduction,
        num_tokens, by_pass,
    )  # fmt: skip


def gradients_come_with_the_loss(
    operands: tuple[Tensor | None, ...],
    token_weight: Tensor | None,
    reduction: str,
    num_tokens: Tensor | float | None,
) -> bool:
    """Whether to call linear_oput_loss_sum: three products in place of four."""
    if reduction not in ("sum", "mean") or not torch.is_grad_enabled():
        return False
    if not any(t is not None and t.requires_grad for t in operands):
        return False
    # Only the losses of the single tokens have a gradient for these two
    if any(isinstance(t, Tensor) and t.requires_grad for t in (token_weight, num_tokens)):
        return False
    # A loss scale keeps float16 gradients from underflowing, but it comes with the backward pass
    if any(t is not None and t.dtype == torch.float16 for t in operands):
        return False
    # The gradients are kept outside of what torch.func's transforms follow
    return torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is None


@register_fake("linear_oput_loss")
def _(hidden_masked, hidden_predicted, weight, target, bias=None, **options):
    def loss(hidden):
        return weight.new_empty((0,) if hidden is None else target.shape, dtype=torch.float32)

    return tuple(loss(hidden) for hidden in (hidden_masked, hidden_predicted) * 2)


def _empty_grads(
    hidden_masked, hidden_predicted, weight, bias, needs_masked, needs_predicted, needs_weight,
    needs_bias,
):  # fmt: skip
    def grad(of, needed):
        return weight.new_empty(of.shape if needed and of is not None else (0,))

    return (
        grad(hidden_masked, needs_masked),
        grad(hidden_predicted, needs_predicted),
        grad(weight, needs_weight),
        grad(bias, needs_bias),
    )


@register_fake("linear_oput_loss_backward")
def _(
    grad_masked, grad_predicted, hidden_masked, hidden_predicted, weight, target,
    logsumexp_masked, logsumexp_predicted, bias=None, *, needs_masked=True, needs_predicted=True,
    needs_weight=True, needs_bias=True, **options,
):  # fmt: skip
    return _empty_grads(
        hidden_masked, hidden_predicted, weight, bias, needs_masked, needs_predicted, needs_weight,
        needs_bias,
    )  # fmt: skip


@register_fake("linear_oput_loss_sum")
def _(
    hidden_masked, hidden_predicted, weight, target, bias=None, factor_masked=None,
    factor_predicted=None, *, needs_masked=True, needs_predicted=True, needs_weight=True,
    needs_bias=True, **options,
):  # fmt: skip
    def per_token(hidden):
        return weight.new_empty((0,) if hidden is None else target.shape, dtype=torch.float32)

    return (
        weight.new_empty((), dtype=torch.float32),
        weight.new_empty((2,), dtype=torch.float32),
        per_token(hidden_masked),
        per_token(hidden_predicted),
        *_empty_grads(
            hidden_masked, hidden_predicted, weight, bias, needs_masked, needs_predicted,
            needs_weight, needs_bias,
        ),
    )  # fmt: skip


@register_fake("linear_oput_loss_scale_")
def _(grad, factor):
    return None


_linear_loss_autograd.register()
