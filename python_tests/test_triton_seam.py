"""Where Triton meets the dispatcher: after the checks in C++, imported late, in a supported
version."""

import builtins
import subprocess
import sys

import pytest
import torch
from triton_device import triton_op

import dmax_kernels.triton
from dmax_kernels.triton import IMPLEMENTATIONS, check_triton_version

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's log(0)

X, T = torch.ones(3, 9), torch.zeros(3, dtype=torch.int64)
E, C, M = torch.ones(6, 4), torch.ones(3), torch.zeros(3, dtype=torch.bool)
SEED = torch.tensor([1, 2])
H = torch.ones(3, 4)


def spd_arguments():
    masked = torch.ones(2, 3, dtype=torch.bool)
    per_row = torch.zeros(2, dtype=torch.int32)
    state = (masked, masked.clone(), torch.zeros(2, 3).long(), torch.zeros(2, 3), per_row.bool())
    return torch.ones(2, 3, 6), E, *state, per_row, torch.zeros(2, 3, 4), 5, 0.5, 0.9


def edit_arguments():
    editable, token = torch.ones(2, 3, dtype=torch.bool), torch.zeros(2, 3).long()
    per_row = torch.zeros(2, dtype=torch.int32)
    state = (editable, token, token.clone(), torch.zeros(2, 3), per_row, per_row.bool())
    return torch.ones(2, 3, 6), *state, 5, 0.5, 0.5


# One call per op that its check refuses, in the last argument it looks at wherever that is possible
BAD = {
    "top1_confidence": ((X,), {"temperature": 1e31}),
    "topk_confidence": ((X, 9), {}),
    "row_statistics": ((X,), {"suppress_token": 9}),
    "token_logprobs": ((X, T), {"top_n": 10}),
    "prefix_promote": ((C, M, float("nan")), {}),
    "hybrid_embedding": ((E, T.new_zeros(3, 9), torch.ones(3, 9), M, 0), {}),
    "hybrid_embedding_backward": ((H.half(), E, T, C, M, 0), {}),
    "soft_embedding": ((X, torch.ones(9, 4)), {"temperatures": torch.ones(2)}),
    "soft_embedding_partial": ((X, torch.ones(9, 4)), {"temperatures": T}),
    "top_p_cut": ((X, 0.0), {}),
    "spd_step_": (spd_arguments(), {"suppress_token": 6}),
    "edit_step_": (edit_arguments(), {"suppress_token": 6}),
    "sample_tokens": ((X, SEED.int()), {}),
    "transform_logits_": ((X,), {"bias": X[2]}),
    "oput_loss": ((X, None, T), {"z_loss": -1.0}),
    "oput_loss_backward": ((C, X, T, C), {"z_loss": -1.0}),
    "oput_loss_and_grad_": ((X, torch.ones(9, 3).t(), T), {}),
    "top1_partial": ((X, 0), {"suppress_token": -2}),
    "top1_merge": ((X, X, X.long()), {"temperature": -1.0}),
    "sample_partial": ((X, SEED, 1 << 31), {}),
    "sample_merge": ((X, X, X.long(), X, X[:2]), {}),
    "linear_top1_confidence": ((H, E), {"suppress_token": 6}),
    "linear_token_logprobs": ((H, E, T.new_zeros(2, 9)), {}),
    "linear_oput_loss": ((H, H, E, T), {"z_loss": float("nan")}),
    "linear_oput_loss_backward": ((C, C, H, H, E, T, C, C.half()), {}),
    "linear_oput_loss_sum": ((H, H, E, T, None, C, C.half()), {}),
    "linear_oput_loss_scale_": ((E, torch.ones(2)), {}),
    "linear_sample_tokens": ((H, E, torch.zeros(2, 2).long()), {}),
}


@pytest.mark.parametrize("op", IMPLEMENTATIONS)
def test_triton_refuses_what_cpp_refuses_before_it_writes(op):
    arguments, options = BAD[op]
    before = [t.clone() if torch.is_tensor(t) else t for t in arguments]
    with pytest.raises(RuntimeError) as of_cpp:
        getattr(torch.ops.dmax, op)(*arguments, **options)
    with pytest.raises(RuntimeError) as of_triton:
        IMPLEMENTATIONS[op](*arguments, **options)
    assert str(of_triton.value) == str(of_cpp.value)
    assert str(of_triton.value).startswith(f"{op}: ")
    for t, old in zip(arguments, before, strict=True):
        assert not torch.is_tensor(t) or torch.equal(t, old)


@pytest.mark.parametrize("temperature", [1e-30, 1e30])
def test_a_row_of_minus_infinity_at_the_extreme_temperatures(temperature):
    """1e46 is refused: its inverse is 0 in float32, and the op once returned an id of no token."""
    rows = torch.full((2, 301), -torch.inf)
    for op in ("sample_tokens", "sample_partial"):
        more = (0,) if op == "sample_partial" else ()
        expected = getattr(torch.ops.dmax, op)(rows, SEED, *more, temperature=temperature)
        actual = triton_op(op, rows, SEED, *more, temperature=temperature)
        for a, e in zip(actual, expected, strict=True):
            assert torch.equal(a.nan_to_num(-1), e.nan_to_num(-1))
    flat = torch.arange(301.0).expand(2, 301)
    _, expected = torch.ops.dmax.top1_confidence(flat, temperature=temperature)
    _, actual = triton_op("top1_confidence", flat, temperature=temperature)
    torch.testing.assert_close(actual, expected)


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
    names = {
        schema.name.removeprefix("dmax::")
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("dmax::")
    }
    assert set(IMPLEMENTATIONS) == {name for name in names if not name.startswith("_check_")}
