"""Inputs of linear_oput_loss, what they should give in float64, and the op on both backends."""

import contextlib

import float64
import torch
from triton_device import DEVICE, triton_op

OPTIONS = (
    {},
    {"label_smoothing": 0.1, "z_loss": 1e-3, "temperature": 1.7},
    {"label_smoothing": 1.0},
    {"temperature": 0.6},
)
# Triton's interpreter multiplies the bits of bfloat16 as integers: float16 stands in for it there
NARROW = torch.float16 if DEVICE.type == "cpu" else torch.bfloat16
IGNORED = -100


def case(rows, vocab_size, dim, dtype=torch.float32, exact=False):
    """(hidden of both passes, weight, bias, target). ``exact``: small integers, whose every
    product and sum is exact in float32; else logits with a deviation of about 2."""
    generator = torch.manual_seed(rows + vocab_size)

    def numbers(*shape, scale):
        if exact:
            return torch.randint(-2, 3, shape, generator=generator).to(dtype)
        return (scale * torch.randn(*shape, generator=generator)).to(dtype)

    hidden = [numbers(rows, dim, scale=1.0) for _ in range(2)]
    weight = numbers(vocab_size, dim, scale=2 * dim**-0.5)
    target = torch.randint(0, vocab_size, (rows,), generator=generator)
    target[rows // 2 :: 4] = IGNORED
    return hidden, weight, numbers(vocab_size, scale=1.0), target


def in_float64(hidden, weight, bias, target, grads, options):
    """Losses of the given passes, and the gradients of sum_i grads[i] loss[i]."""
    keep = target != IGNORED
    leaves = [None if t is None else t.double().requires_grad_() for t in (*hidden, weight, bias)]
    losses = []
    total = 0.0
    for h, grad in zip(leaves[:2], grads, strict=True):
        if h is None:
            losses.append(None)
            continue
        logits = h.where(keep[:, None], 0) @ leaves[2].t()
        logits = logits if bias is None else logits + leaves[3]
        loss = keep * float64.token_loss(logits, target.where(keep, 0).long(), **options)
        losses.append(loss.detach())
        total = total + (loss * grad.double()).sum()
    total.backward()
    return losses, [None if leaf is None else leaf.grad for leaf in leaves]


@contextlib.contextmanager
def dmax_calls():
    """Gives the list of the names of torch.ops.dmax's ops that run in the block."""
    names = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            if function.namespace == "dmax":
                names.append(function._schema.name.removeprefix("dmax::"))
            return function(*arguments, **(options or {}))

    with Record():
        yield names


def cpu(name, *arguments, **options):
    return getattr(torch.ops.dmax, name)(*arguments, **options)


BACKENDS = {"cpu": cpu, "triton": triton_op}


def run(backend, hidden, weight, bias, target, grads, **options):
    """(losses and logsumexps of both passes, gradients of both hiddens, weight and bias)."""
    op = BACKENDS[backend]
    results = op("linear_oput_loss", *hidden, weight, target, bias, **options)
    grads = [torch.empty(0) if h is None else g for h, g in zip(hidden, grads, strict=True)]
    return results, op(
        "linear_oput_loss_backward", *grads, *hidden, weight, target, *results[2:], bias, **options
    )
