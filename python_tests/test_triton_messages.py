"""Bad input: the Triton ops say word for word what the C++ ops say; an old Triton says so."""

import builtins
import subprocess
import sys

import pytest
import torch

import dmax_kernels.triton
from dmax_kernels.triton import IMPLEMENTATIONS, check_triton_version

X, T = torch.ones(3, 9), torch.zeros(3, dtype=torch.int64)
E, C, M = torch.ones(6, 4), torch.ones(3), torch.zeros(3, dtype=torch.bool)
SEED = torch.tensor([1, 2])
G, H = torch.ones(3), torch.ones(3, 4)
NAN, INF = float("nan"), float("inf")


def spd(**changes):
    masked = torch.ones(2, 3, dtype=torch.bool)
    arguments = {
        "logits": torch.ones(2, 3, 6),
        "embedding": E,
        "editable": masked,
        "masked": masked.clone(),
        "token": torch.zeros(2, 3, dtype=torch.int64),
        "confidence": torch.zeros(2, 3),
        "converged": torch.zeros(2, dtype=torch.bool),
        "step": torch.zeros(2, dtype=torch.int32),
        "inputs_embeds": torch.zeros(2, 3, 4),
        "mask_token_id": 5,
        "tau_dec": 0.5,
        "tau_acc": 0.9,
    }
    options = {k: v for k, v in changes.items() if k not in arguments}
    return "spd_step_", (*(changes.get(k, v) for k, v in arguments.items()),), options


# Every check of csrc/ops once
BAD = [
    ("top1_confidence", (torch.tensor(1.0),), {}),
    ("top1_confidence", (torch.ones(2, 0),), {}),
    ("top1_confidence", (X.double(),), {}),
    ("top1_confidence", (torch.ones(2, 3, dtype=torch.complex64),), {}),
    *(("top1_confidence", (X,), {"temperature": t}) for t in (0.0, -1.5, INF, NAN, 1e-31)),
    *(("top1_confidence", (X,), {"suppress_token": t}) for t in (9, -2)),
    ("row_statistics", (torch.tensor(1.0),), {}),
    ("row_statistics", (X.long(),), {}),
    ("row_statistics", (X,), {"temperature": 0.0}),
    ("row_statistics", (X,), {"suppress_token": 9}),
    ("topk_confidence", (X, 0), {}),
    ("topk_confidence", (X, 9), {}),
    ("topk_confidence", (X[:, :3], 4), {}),
    ("topk_confidence", (X.bool(), 1), {}),
    ("prefix_promote", (C.half(), M, 0.5), {}),
    ("prefix_promote", (C, T, 0.5), {}),
    ("prefix_promote", (torch.tensor(1.0), torch.tensor(True), 0.5), {}),
    ("prefix_promote", (C, M[:2], 0.5), {}),
    ("prefix_promote", (C, M, NAN), {}),
    ("hybrid_embedding", (torch.ones(6), T, C, M, 0), {}),
    ("hybrid_embedding", (E.double(), T, C, M, 0), {}),
    ("hybrid_embedding", (E, T.float(), C, M, 0), {}),
    ("hybrid_embedding", (E, T, C.half(), M, 0), {}),
    ("hybrid_embedding", (E, T, C, T, 0), {}),
    ("hybrid_embedding", (E, T[:2], C, M, 0), {}),
    ("hybrid_embedding", (E, T, C[:2], M, 0), {}),
    ("hybrid_embedding", (E, torch.tensor(1), torch.tensor(1.0), M, 0), {}),
    ("hybrid_embedding", (E, T.new_zeros(3, 9), torch.ones(3, 9), M, 0), {}),
    ("hybrid_embedding", (E, T, C, M, 6), {}),
    ("hybrid_embedding", (E, T, C, M, -1), {}),
    ("hybrid_embedding_backward", (torch.ones(3, 5), E, T, C, M, 0), {}),
    ("hybrid_embedding_backward", (torch.ones(3, 4).half(), E, T, C, M, 0), {}),
    ("sample_tokens", (X, SEED), {"temperature": -1.0}),
    ("sample_tokens", (X, SEED), {"suppress_token": 9}),
    ("sample_tokens", (X, SEED.int()), {}),
    ("sample_tokens", (X, torch.tensor(1)), {}),
    ("sample_tokens", (X, torch.tensor([1, 2, 3])), {}),
    ("sample_tokens", (X, T.new_zeros(2, 2)), {}),
    ("oput_loss", (None, None, T), {}),
    ("oput_loss", (X, X[:, :5], T), {}),
    ("oput_loss", (X, X.half(), T), {}),
    ("oput_loss", (X.long(), None, T), {}),
    ("oput_loss", (None, X.long(), T), {}),
    ("oput_loss", (X, None, T.float()), {}),
    ("oput_loss", (X, None, T[:2]), {}),
    *(("oput_loss", (X, None, T), {"label_smoothing": s}) for s in (-0.1, 1.5, NAN)),
    *(("oput_loss", (X, None, T), {"z_loss": z}) for z in (-1.0, INF, NAN)),
    ("oput_loss_backward", (G.double(), X, T, G), {}),
    ("oput_loss_backward", (G, X, T, G[:2]), {}),
    ("oput_loss_backward", (G, X, T[:2], G), {}),
    ("oput_loss_backward", (G, X, T, G), {"z_loss": -1.0}),
    ("oput_loss_and_grad_", (None, None, T), {}),
    ("oput_loss_and_grad_", (X, None, T, G.double()), {}),
    ("oput_loss_and_grad_", (X, None, T, None, G[:2]), {}),
    ("oput_loss_and_grad_", (X.t().contiguous().t(), None, T), {}),
    ("oput_loss_and_grad_", (X[:1].expand(3, 9), None, T), {}),
    ("top1_partial", (X.double(), 0), {}),
    ("top1_partial", (X, -1), {}),
    ("top1_partial", (X, 0), {"temperature": 0.0}),
    ("top1_partial", (X, 0), {"suppress_token": -2}),
    ("top1_merge", (X.double(), X, X.long()), {}),
    ("top1_merge", (X, X.half(), X.long()), {}),
    ("top1_merge", (X, X, X.int()), {}),
    ("top1_merge", (torch.tensor(1.0), X, X.long()), {}),
    ("top1_merge", (torch.ones(0, 3), X, X.long()), {}),
    ("top1_merge", (X, X[:2], X.long()), {}),
    ("top1_merge", (X, X, X.long()[:2]), {}),
    ("top1_merge", (X, X, X.long()), {"temperature": -1.0}),
    ("sample_partial", (X.double(), SEED, 0), {}),
    ("sample_partial", (X, SEED, -1), {}),
    ("sample_partial", (X, SEED, (1 << 31) - 2), {}),
    ("sample_partial", (X, SEED.int(), 0), {}),
    ("sample_partial", (X, SEED, 0), {"temperature": 0.0}),
    ("sample_partial", (X, SEED, 0), {"suppress_token": -2}),
    ("sample_merge", (X, X, X.long(), X, X.half()), {}),
    ("sample_merge", (X, X, X.long(), X[:2], X), {}),
    ("sample_merge", (X, X, X.long(), X, X[:2]), {}),
    *(
        (op, (*arguments, *more), options)
        for op, more in (("linear_top1_confidence", ()), ("linear_sample_tokens", (SEED,)))
        for arguments, options in (
            ((torch.ones(3, 4).long(), E), {}),
            ((torch.ones(3, 4), torch.ones(6)), {}),
            ((torch.ones(3, 4), torch.ones(0, 4)), {}),
            ((torch.ones(3, 4), E.half()), {}),
            ((torch.ones(3, 5), E), {}),
            ((torch.tensor(1.0), E), {}),
            ((torch.ones(3, 4), E), {"bias": torch.ones(6).half()}),
            ((torch.ones(3, 4), E), {"bias": torch.ones(5)}),
            ((torch.ones(3, 4), E), {"temperature": -1.0}),
            ((torch.ones(3, 4), E), {"suppress_token": 6}),
        )
    ),
    ("linear_sample_tokens", (torch.ones(3, 4), E, SEED.int()), {}),
    *(
        ("linear_oput_loss", (*hidden, weight, target), options)
        for hidden, weight, target, options in (
            ((None, None), E, T, {}),
            ((None, H.long()), E, T, {}),
            ((H, None), E[0], T, {}),
            ((H, None), E.half(), T, {}),
            ((None, H[:, :3]), E, T, {}),
            ((H, H.half()), E, T, {}),
            ((H, H[:2]), E, T, {}),
            ((H, None), E, T.float(), {}),
            ((H, None), E, T[:2], {}),
            ((H, H), E, T, {"bias": E[:2, 0]}),
            ((H, H), E, T, {"bias": E[:, 0].half()}),
            ((H, H), E, T, {"label_smoothing": 2.0}),
            ((H, H), E, T, {"z_loss": NAN}),
        )
    ),
    *(
        ("linear_oput_loss_backward", (*grads, H, H, E, T, *logsumexps), {})
        for grads, logsumexps in (
            ((G.double(), G), (G, G)),
            ((G, G[:2]), (G, G)),
            ((G, G), (G[:2], G)),
            ((G, G), (G, G.half())),
        )
    ),
    ("linear_sample_tokens", (torch.ones(3, 4), E, torch.zeros(2, 2).long()), {}),
    spd(logits=X),
    spd(logits=torch.ones(2, 0, 6)),
    spd(logits=torch.ones(2, 3, 6).long()),
    spd(embedding=torch.ones(5, 4)),
    spd(embedding=E.double()),
    spd(editable=torch.ones(2, 3)),
    spd(masked=torch.ones(3, 2, dtype=torch.bool)),
    spd(token=torch.zeros(2, 3, dtype=torch.int32)),
    spd(confidence=torch.zeros(3, 2).t()),
    spd(converged=torch.zeros(3, dtype=torch.bool)),
    spd(step=torch.zeros(2, dtype=torch.int64)),
    spd(inputs_embeds=torch.zeros(2, 3, 4).half()),
    spd(mask_token_id=6),
    spd(tau_dec=NAN),
    spd(tau_acc=NAN),
    spd(top_k=7),
    spd(temperature=0.0),
    spd(suppress_token=6),
    *(spd(semantics=code) for code in (-1, 3)),
    spd(thresholds=torch.ones(2, 3)),
    spd(thresholds=torch.ones(2, 2).double()),
]


@pytest.mark.parametrize("call", BAD, ids=lambda call: call[0])
def test_same_words(call):
    op, arguments, options = call
    with pytest.raises(RuntimeError) as of_cpp:
        getattr(torch.ops.dmax, op)(*arguments, **options)
    with pytest.raises(RuntimeError) as of_triton:
        IMPLEMENTATIONS[op](*arguments, **options)
    assert str(of_triton.value) == str(of_cpp.value)
    assert str(of_triton.value).startswith(("hybrid_embedding: ", f"{op}: "))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs two devices")
def test_same_words_about_devices():
    with pytest.raises(RuntimeError, match="prefix_promote: masked must be on the same device"):
        IMPLEMENTATIONS["prefix_promote"](C.cuda(), M, 0.5)


def test_old_triton_names_the_version_needed():
    check_triton_version("3.6.0")
    check_triton_version("3.10.0+git1a2b3c")
    with pytest.raises(RuntimeError, match=r"need Triton 3\.6 or newer, found 3\.5\.1"):
        check_triton_version("3.5.1")


def test_missing_triton_says_what_to_install(monkeypatch):
    real_import = builtins.__import__

    def no_triton(name, *args, **kwargs):
        if name == "triton":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    dmax_kernels.triton._load.cache_clear()
    monkeypatch.setattr(builtins, "__import__", no_triton)
    with pytest.raises(RuntimeError, match="Triton is not installed"):
        IMPLEMENTATIONS["top1_confidence"](X)


def test_importing_the_package_does_not_import_triton():
    code = "import dmax_kernels, dmax_kernels.triton, sys; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_op_and_gradient_is_there():
    schemas = {
        schema.name.removeprefix("dmax::")
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("dmax::")
    }
    assert set(IMPLEMENTATIONS) == schemas
