"""Random shapes, strides, dtypes and values: every op on every backend against its reference.

A few dozen examples by default; ``make fuzz`` runs thousands (DMAX_FUZZ_EXAMPLES). Backends that
run everywhere: C++ ("cpu") and the CUDA kernels under emulation, which is slow and gets a share of
the examples. On a GPU machine "cuda" is whatever the dispatcher has there.
"""

import os
from types import SimpleNamespace

import pytest
import simt_ops
import torch
from decoding_models import RandomModel, random_prompts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dmax_kernels
from dmax_kernels import reference
from dmax_kernels.decoding import spd_generate
from dmax_kernels.testing.tolerances import REFERENCE_RTOL, ROUNDING

EXAMPLES = int(os.environ.get("DMAX_FUZZ_EXAMPLES", "40"))
NAN, INF = float("nan"), float("inf")

# backend -> (its functions, device, one in how many of the examples, widest vocabulary)
BACKENDS = {
    "cpu": (dmax_kernels, "cpu", 1, 5000),
    "cuda, emulated": (simt_ops, "cpu", 4, 300),
    "cuda": (dmax_kernels, "cuda", 1, 200_000),
}
backend_and_device = pytest.mark.parametrize(
    "backend",
    [pytest.param(name, marks=[pytest.mark.gpu] if name == "cuda" else []) for name in BACKENDS],
)


def fuzz(backend):
    return settings(
        max_examples=max(EXAMPLES // BACKENDS[backend][2], 5),
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "unaligned": lambda x: torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x),
    "padded rows": lambda x: torch.full((*x.shape[:-1], x.shape[-1] + 3), 77.0, dtype=x.dtype)[
        ..., : x.shape[-1]
    ].copy_(x),
    "every second": lambda x: torch.full((*x.shape[:-1], 2 * x.shape[-1]), 77.0, dtype=x.dtype)[
        ..., ::2
    ].copy_(x),
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "one row expanded": lambda x: x[:1].expand(x.shape) if x.shape[0] else x,
}

VALUES = {
    "normal": lambda x: 3 * x,
    "ties": lambda x: (2 * x).round(),
    "equal": lambda x: 0 * x,
    "large offset": lambda x: x + 1e4,
    "spread": lambda x: 40 * x,
}
SPECIALS = (NAN, INF, -INF, 60.0, -60.0, 65504.0, -0.0)


@st.composite
def logits(draw, backend, shapes=((0,), (1,), (2,), (5,), (2, 3), (1, 1, 2))):
    """Rows of logits [..., V]."""
    if backend == "cuda, emulated":  # the host side, not emulated, launches nothing for no rows
        shapes = [shape for shape in shapes if 0 not in shape]
    rows = draw(st.sampled_from(shapes))
    widest = BACKENDS[backend][3]
    vocab = draw(st.one_of(st.integers(1, 40), st.integers(41, widest)))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 32)))
    x = torch.randn(*rows, vocab, generator=generator)
    x = VALUES[draw(st.sampled_from(sorted(VALUES)))](x)
    places = st.tuples(st.integers(0, max(x.numel() - 1, 0)), st.sampled_from(SPECIALS))
    for place, value in draw(st.lists(places, max_size=3)) if x.numel() else []:
        x.view(-1)[place] = value
    if draw(st.integers(0, 9)) == 0:
        x[..., : draw(st.integers(0, vocab))] = -INF
    return LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))](x.to(dtype))


@st.composite
def options(draw, vocab):
    return {
        "temperature": draw(st.sampled_from([1.0, 1.0, 0.1, 0.7, 3.0])),
        "suppress_token": draw(st.one_of(st.just(-1), st.integers(0, vocab - 1))),
    }


def on(device, x):
    return x.to(device) if isinstance(x, torch.Tensor) else x


def check(op, backend, arguments, keywords, rtol=REFERENCE_RTOL, atol=1e-7):
    """Integers equal, floats close, shapes and dtypes those of the reference."""
    functions, device, *_ = BACKENDS[backend]
    expected = getattr(reference, op)(*arguments, **keywords)
    actual = getattr(functions, op)(*(on(device, x) for x in arguments), **keywords)
    pair = [(expected, actual)] if torch.is_tensor(expected) else zip(expected, actual, strict=True)
    for want, have in pair:
        assert (have is None) == (want is None)
        if want is not None:
            torch.testing.assert_close(have.cpu(), want, rtol=rtol, atol=atol, equal_nan=True)


@backend_and_device
@pytest.mark.parametrize("op", ["top1_confidence", "topk_confidence", "sample_tokens"])
def test_row_ops(op, backend):
    @fuzz(backend)
    @given(data=st.data())
    def run(data):
        x = data.draw(logits(backend))
        keywords = data.draw(options(x.shape[-1]))
        arguments = [x]
        if op == "topk_confidence":
            arguments.append(data.draw(st.integers(1, min(8, x.shape[-1]))))
        if op == "sample_tokens":
            arguments.append(torch.tensor([data.draw(st.integers(0, 1 << 62)), 7]))
        check(op, backend, arguments, keywords)

    run()


@backend_and_device
def test_prefix_promote(backend):
    @fuzz(backend)
    @given(data=st.data())
    def run(data):
        rows, block = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 70))
        generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1 << 32)))
        confidence = (torch.rand(rows, block, generator=generator) * 4).round() / 4  # ties with tau
        confidence[torch.rand(rows, block, generator=generator) < 0.05] = NAN
        masked = torch.rand(rows, block, generator=generator) < data.draw(st.floats(0, 1))
        threshold = data.draw(st.sampled_from([0.0, 0.25, 0.5, 1.0]))
        keywords = {"inclusive": data.draw(st.booleans())}
        check("prefix_promote", backend, [confidence, masked, threshold], keywords)

    run()


@backend_and_device
def test_hybrid_embedding(backend):
    @fuzz(backend)
    @given(data=st.data())
    def run(data):
        rows, vocab = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 50))
        dim, k = data.draw(st.integers(1, 130)), data.draw(st.integers(1, 4))
        dtype = data.draw(st.sampled_from(sorted(ROUNDING, key=str)))
        generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1 << 32)))
        embedding = torch.randn(vocab, dim, generator=generator).to(dtype)
        embedding[data.draw(st.integers(0, vocab - 1))] = 0
        token = torch.randint(0, vocab, (rows, k), generator=generator)
        confidence = torch.rand(rows, k, generator=generator) / k
        confidence[torch.rand(rows, k, generator=generator) < 0.2] = 1.0
        masked = torch.rand(rows, generator=generator) < 0.4
        mask_token_id = data.draw(st.integers(0, vocab - 1))
        arguments = [embedding, token, confidence, masked, mask_token_id]
        # opposite embeddings cancel: what is left of the mix carries their rounding, relatively
        scale = float(embedding.float().norm(dim=-1).max()) + 1e-6
        check("hybrid_embedding", backend, arguments, {}, 4 * ROUNDING[dtype], 1e-4 * scale)

    run()


@backend_and_device
def test_oput_loss(backend):
    @fuzz(backend)
    @given(data=st.data())
    def run(data):
        x = data.draw(logits(backend, ((0,), (1,), (3,), (5,))))
        vocab = x.shape[-1]
        target = torch.randint(0, vocab, (x.shape[0],), generator=torch.Generator().manual_seed(1))
        target[torch.arange(x.shape[0]) % 3 == 2] = -100
        keywords = {
            "label_smoothing": data.draw(st.sampled_from([0.0, 0.1])),
            "z_loss": data.draw(st.sampled_from([0.0, 1e-4])),
        }
        other = data.draw(st.sampled_from([None, x.flip(0)]))
        atol = 2e-6 * float(x.float().nan_to_num(0, 0, 0).abs().max()) if x.numel() else 0.0
        check("oput_loss", backend, [x, other, target], keywords, rtol=2e-5, atol=1e-6 + atol)

    run()


@given(
    rows=st.integers(1, 4),
    length=st.integers(1, 12),
    seed=st.integers(0, 1 << 16),
    block_length=st.sampled_from([4, 8]),
    tau_dec=st.sampled_from([0.0, 0.3, 0.6, 0.95]),
    tau_acc=st.sampled_from([0.5, 0.9, 1.0]),
    semantics=st.sampled_from(["paper", "released"]),
    top_k=st.integers(1, 3),
)
@settings(max_examples=max(EXAMPLES // 4, 5), deadline=None)
def test_trajectories(rows, length, seed, block_length, tau_dec, tau_acc, semantics, top_k):
    """Whole generations of a random model: the same tokens, step counts and promotions."""
    arguments = SimpleNamespace(
        max_new_tokens=16, block_length=block_length, tau_dec=tau_dec, tau_acc=tau_acc,
        semantics=semantics, top_k=top_k,
    )  # fmt: skip
    prompts = random_prompts(rows, length, seed)
    outputs = [
        spd_generate(RandomModel(seed), prompts, ops=ops, **vars(arguments))
        for ops in ("reference", "fused")
    ]
    assert outputs[0].sequences.tolist() == outputs[1].sequences.tolist()
    assert outputs[0].num_forwards.tolist() == outputs[1].num_forwards.tolist()


@pytest.mark.slow
def test_soak():
    """10^5 steps over changing batches: memory stays flat."""
    import resource

    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn(512, 16, generator=generator)
    levels = []
    for step in range(100_000):
        if step % 100 == 0:
            batch, block = 1 + step // 100 % 7, (4, 8, 32)[step // 700 % 3]
            state = fresh_state(batch, block, embedding)
        logits = torch.randn(batch, block, 512, generator=generator)
        dmax_kernels.spd_step_(
            logits, embedding, **state, mask_token_id=511, tau_dec=0.05, tau_acc=0.99
        )
        dmax_kernels.sample_tokens(logits, torch.tensor([step, 0]))
        if step % 10_000 == 9_999:
            levels.append(resident_bytes())
    assert levels[-1] - levels[0] < 8 << 20, (levels, resource.getrusage(resource.RUSAGE_SELF))


def fresh_state(batch, block, embedding):
    return {
        "editable": torch.ones(batch, block, dtype=torch.bool),
        "masked": torch.ones(batch, block, dtype=torch.bool),
        "token": torch.full((batch, block), 511),
        "confidence": torch.zeros(batch, block),
        "converged": torch.zeros(batch, dtype=torch.bool),
        "step": torch.zeros(batch, dtype=torch.int32),
        "inputs_embeds": embedding[511].expand(batch, block, -1).clone(),
    }


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
