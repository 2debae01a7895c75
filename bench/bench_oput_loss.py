"""oput_loss, forward and backward of both passes, against eager cross-entropy."""

import torch
import torch.nn.functional as F

import dmax_kernels
from bench.cases import DTYPES, VOCAB, Case, Work, benchmark_of, flat_logits


def build(tokens, dtype):
    first = flat_logits(tokens, DTYPES[dtype])
    leaves = [first.requires_grad_(), first.detach().flip(0).requires_grad_()]
    target = torch.randint(0, VOCAB, (tokens,), generator=torch.manual_seed(2))

    def eager():
        # As the released training code: logits in float32, then log-softmax and its gradient
        loss = sum(F.cross_entropy(x.float(), target) for x in leaves)
        return torch.autograd.grad(loss, leaves)

    def fused():
        loss = dmax_kernels.oput_loss(*leaves, target, reduction="mean")
        return torch.autograd.grad(loss, leaves)

    return Work({"eager": eager, "fused": fused}, read=torch.cat(leaves).detach())


CASES = [
    Case(
        f"oput_loss 2 x 64 x 157184 {dtype} forward and backward",
        lambda d=dtype: build(64, d),
        target=2.0,
    )
    for dtype in DTYPES
]

test_benchmark = benchmark_of(CASES)
