"""spd_step_ against the eager reference of the whole step, on a block in the middle of decoding."""

import torch

import dmax_kernels
from bench.cases import DIM, DTYPES, LOGITS, MASK, VOCAB, Case, Work, benchmark_of
from dmax_kernels import reference


def build(batch, block, dtype, kind):
    logits = LOGITS[kind](batch * block, DTYPES[dtype]).view(batch, block, VOCAB)
    embedding = torch.randn(VOCAB, DIM, generator=torch.manual_seed(1)).to(DTYPES[dtype])
    masked = torch.arange(block).expand(batch, block) >= block // 2
    start = {
        "masked": masked,
        "token": torch.full((batch, block), MASK),
        "confidence": torch.zeros(batch, block),
        "converged": torch.zeros(batch, dtype=torch.bool),
        "step": torch.ones(batch, dtype=torch.int32),
        "inputs_embeds": torch.zeros(batch, block, DIM, dtype=DTYPES[dtype]),
    }
    state = {name: tensor.clone() for name, tensor in start.items()}
    editable = torch.ones(batch, block, dtype=torch.bool)

    def restore():
        for name, tensor in start.items():
            state[name].copy_(tensor)

    def run(op):
        op(
            logits,
            embedding,
            editable=editable,
            **state,
            mask_token_id=MASK,
            tau_dec=0.5,
            tau_acc=0.9,
        )

    return Work(
        {
            "eager": lambda: run(reference.spd_step_),
            "fused": lambda: run(dmax_kernels.spd_step_),
        },
        before_each=restore,
        read=logits,
    )


CASES = [
    Case(
        f"spd_step_ {batch} x {block} x 157184 {dtype} {kind}",
        lambda a=(batch, block, dtype, kind): build(*a),
        target=8.0 if batch == 1 else None,
    )
    for batch, block in ((1, 32), (4, 32))
    for dtype in DTYPES
    for kind in LOGITS
    if not (batch == 4 and dtype == "float32")
]

test_benchmark = benchmark_of(CASES)
