"""The gradient of linear_token_logprobs, from logits computed again."""

import torch

from dmax_kernels.ops._logprob_blocks import Rows, blocks_of, gradients_of_head, kept_rows
from dmax_kernels.ops._register import once_differentiable


def setup_context(ctx, inputs, options, output):
    _, rank, top_ids, top_logprobs, logsumexp = output
    ctx.options = (options["temperature"], options["ignore_index"])
    ctx.mark_non_differentiable(rank, top_ids, top_logprobs, logsumexp)
    ctx.save_for_backward(*inputs, options["allowed"], logsumexp)


def check_one_id(ids_shape: torch.Size, hidden: torch.Tensor) -> None:
    if len(ids_shape) == hidden.dim():
        raise RuntimeError(
            "linear_token_logprobs: has a gradient for one id per row only, got ids of shape "
            f"{list(ids_shape)} for hidden of shape {list(hidden.shape)}"
        )


@once_differentiable("linear_token_logprobs")
def backward(ctx, grad_logprob, *_):
    # Its products are no op of ours that could refuse a second derivative, which would be wrong
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError("linear_token_logprobs: has no gradient under torch.func; use autograd")
    hidden, weight, ids, bias, allowed, logsumexp = ctx.saved_tensors
    check_one_id(ids.shape, hidden)
    temperature, ignore_index = ctx.options
    ids, log_sum = ids.reshape(-1).long(), logsumexp.reshape(-1)
    flat = kept_rows(hidden, ids, ignore_index)
    zero = torch.zeros_like(log_sum, dtype=torch.float64)
    known = ((ids >= 0) & (ids < len(weight))) | (ids == ignore_index)
    # log p = (x - temperature logsumexp) / temperature
    rows = Rows(log_sum * temperature, zero, zero, ids, torch.where(known, 0.0, torch.nan))
    if allowed is not None:
        allowed = allowed.reshape(-1, allowed.shape[-1])
    needs_hidden, needs_weight, _, needs_bias = ctx.needs_input_grad[:4]
    grad_hidden, grad_weight, grad_bias = gradients_of_head(
        blocks_of(flat, weight, bias), flat, weight, bias, rows, ids, grad_logprob, None, 0,
        ctx.options, (needs_hidden, needs_weight, needs_bias), allowed,
    )  # fmt: skip
    if grad_hidden is not None:
        grad_hidden = grad_hidden.to(flat.dtype).view(hidden.shape)
    return grad_hidden, grad_weight, None, grad_bias
