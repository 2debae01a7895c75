"""What test_fuzz.py draws and compares: backends, random logits, and the checks.

Backends that run everywhere: C++ ("cpu"), the CUDA kernels under emulation and Triton under its
interpreter; the last two are slow and get a share of the examples. On a GPU machine "cuda" is
whatever the dispatcher has there, and Triton compiles.
"""

import os
from types import SimpleNamespace

import pytest
import simt_ops
import torch
from draws import assert_drawn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from masks import packed
from tolerances import REFERENCE_RTOL
from triton_device import DEVICE

import dmax_kernels
from dmax_kernels import reference
from dmax_kernels.ops._temperature import read_temperature
from dmax_kernels.ops.edit_step import EDIT_RULES
from dmax_kernels.ops.spd_step import SEMANTICS
from dmax_kernels.ops.transform import penalty_options
from dmax_kernels.triton import IMPLEMENTATIONS
from dmax_kernels.vocabulary import visible_head, visible_rows

EXAMPLES = int(os.environ.get("DMAX_FUZZ_EXAMPLES", "40"))
NAN, INF = float("nan"), float("inf")


def public_loss(op):
    """Triton's op with the results of the public function."""

    def call(masked, predicted, *arguments, **options):
        losses = IMPLEMENTATIONS[op](masked, predicted, *arguments, **options)[:2]
        passes = zip((masked, predicted), losses, strict=True)
        return tuple(None if logits is None else loss for logits, loss in passes)

    return call


VISIBILITY = ("suppress_tokens", "allowed", "vocab_limit")


def with_visibility(op):
    """Triton's op with the options of the public function: those that say which tokens count, and
    a temperature of each row."""

    def call(rows, *arguments, suppress_token=-1, **options):
        which = {name: options.pop(name) for name in VISIBILITY if name in options}
        which |= {"suppress_token": suppress_token, "as_mask": op.endswith("token_logprobs")}
        if op.startswith("linear"):
            weight, *others, bias = arguments
            weight, bias, suppress_token, allowed = visible_head(op, weight, bias, **which)
            arguments = (weight, *others, bias)
        else:
            rows, suppress_token, allowed = visible_rows(op, rows, **which)
        if not which["as_mask"]:
            options["suppress_token"] = suppress_token
        if op == "row_statistics":
            number, of_rows = read_temperature(rows, options.get("temperature", 1.0))
            options |= {"temperature": number, "temperatures": of_rows}
        return IMPLEMENTATIONS[op](rows, *arguments, allowed=allowed, **options)

    return call


CHOOSERS = (
    "top1_confidence", "topk_confidence", "row_statistics", "token_logprobs", "sample_tokens",
    "linear_top1_confidence", "linear_sample_tokens", "linear_token_logprobs",
)  # fmt: skip


def spd_step_of_triton(logits, embedding, *, semantics="settled", **arguments):
    with_visibility("spd_step_")(
        logits, embedding, semantics=SEMANTICS.index(semantics), **arguments
    )


def edit_step_of_triton(logits, *, rule="threshold", edit_threshold=0.0, **arguments):
    with_visibility("edit_step_")(
        logits, edit_threshold=edit_threshold, rule=EDIT_RULES.index(rule), **arguments
    )


def transform_of_triton(
    logits, *, repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0, **options
):
    penalties = penalty_options(
        logits, repetition_penalty=repetition_penalty, presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
    )  # fmt: skip
    IMPLEMENTATIONS["transform_logits_"](logits, **options, **penalties)


TRITON = SimpleNamespace(
    **IMPLEMENTATIONS
    | {op: public_loss(op) for op in ("oput_loss", "oput_loss_and_grad_")}
    | {op: with_visibility(op) for op in CHOOSERS}
    | {"spd_step_": spd_step_of_triton, "edit_step_": edit_step_of_triton}
    | {"transform_logits_": transform_of_triton}
)

# backend -> (its functions, device, one in how many of the examples, widest vocabulary)
BACKENDS = {
    "cpu": (dmax_kernels, "cpu", 1, 5000),
    "cuda, emulated": (simt_ops, "cpu", 4, 300),
    "triton": (TRITON, DEVICE, 16, 5000),
    "cuda": (dmax_kernels, "cuda", 1, 200_000),
}
# And the reference, where a test has something else to compare it with
FUNCTIONS = {"reference": (reference, "cpu"), **{b: of[:2] for b, of in BACKENDS.items()}}


def gpu_marked(names):
    return [pytest.param(name, marks=[pytest.mark.gpu] * (name == "cuda")) for name in names]


everywhere = pytest.mark.parametrize("backend", gpu_marked(FUNCTIONS))


def run_examples(test, backend, **parameters):
    def example(data):
        test(data.draw, backend, **parameters)

    example.__name__ = test.__name__  # hypothesis keeps failures under it
    one_in = BACKENDS[backend][2] if backend in BACKENDS else 4  # the reference
    share = settings(
        max_examples=max(EXAMPLES // one_in, 3),
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    share(given(data=st.data())(example))()


def on_every_backend(*ops, but=()):
    """Runs test(draw, backend), or test(draw, backend, op) for each op, with the backend's share
    of the examples."""
    names = gpu_marked(name for name in BACKENDS if name not in but)

    def decorate(test):
        def run(backend):
            run_examples(test, backend)

        def run_op(backend, op):
            run_examples(test, backend, op=op)

        if ops:
            run = pytest.mark.parametrize("op", ops)(run_op)
        return pytest.mark.parametrize("backend", names)(run)

    return decorate


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
FLOATS = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def random_generator(draw):
    return torch.Generator().manual_seed(draw(st.integers(0, 1 << 32)))


@st.composite
def logits(draw, backend, shapes=((0,), (1,), (2,), (5,), (2, 3), (1, 1, 2)), widest=None):
    """Rows of logits [..., V]."""
    if backend == "cuda, emulated":  # its host side launches nothing for no rows
        shapes = [shape for shape in shapes if 0 not in shape]
    rows = draw(st.sampled_from(shapes))
    vocab = draw(st.one_of(st.integers(1, 40), st.integers(41, widest or BACKENDS[backend][3])))
    dtype = draw(FLOATS)
    x = torch.randn(*rows, vocab, generator=random_generator(draw))
    x = VALUES[draw(st.sampled_from(sorted(VALUES)))](x)
    places = st.tuples(st.integers(0, max(x.numel() - 1, 0)), st.sampled_from(SPECIALS))
    for place, value in draw(st.lists(places, max_size=3)) if x.numel() else []:
        x.view(-1)[place] = value
    if draw(st.integers(0, 9)) == 0:
        x[..., : draw(st.integers(0, vocab))] = -INF
    return in_some_layout(draw, x.to(dtype))


def in_some_layout(draw, x):
    return LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))](x)


@st.composite
def options(draw, vocab):
    return {
        "temperature": draw(st.sampled_from([1.0, 1.0, 0.1, 0.7, 3.0])),
        "suppress_token": draw(st.one_of(st.just(-1), st.integers(0, vocab - 1))),
    }


@st.composite
def visibility(draw, x, names=VISIBILITY):
    """(options that say which tokens count, the logits of these: the others are -inf, or cut off
    by the limit). Masks of one row for all and of each row, with anything in the bits past V.
    """
    vocab, which = x.shape[-1], {}
    if "vocab_limit" in names and draw(st.integers(0, 2)) == 0:
        which["vocab_limit"] = vocab = draw(st.integers(1, vocab))
    seen = x[..., :vocab]
    share = draw(st.sampled_from([None, None, 0.0, 0.1, 0.6, 0.97]))
    if "allowed" in names and share is not None:
        rows = draw(st.sampled_from([(), (1,) * (x.dim() - 1), tuple(x.shape[:-1])]))
        whole_words = -(-x.shape[-1] // 32) * 32
        bits = torch.rand(*rows, whole_words, generator=random_generator(draw)) < share
        if rows == tuple(x.shape[:-1]) and bits.numel() > whole_words and draw(st.booleans()):
            bits.view(-1, whole_words)[0] = False
        which["allowed"] = packed(bits)
        seen = seen.masked_fill(~bits[..., :vocab], -INF)
    if "suppress_tokens" in names and draw(st.integers(0, 2)) == 0:
        ids = draw(st.lists(st.integers(0, vocab - 1), min_size=1, max_size=3))
        which["suppress_tokens"] = tuple(ids)
        seen = seen.index_fill(-1, torch.tensor(ids), -INF)
    return which, seen


@st.composite
def linear_inputs(draw, backend):
    """(hidden, weight, bias or None): small integers, whose every product and sum is exact in
    float32, or normal numbers."""
    interpreted = backend == "triton" and DEVICE.type == "cpu"
    # Triton's interpreter multiplies the bits of bfloat16 as integers
    dtypes = FLOATS.filter(lambda dtype: dtype != torch.bfloat16) if interpreted else FLOATS
    dtype = draw(dtypes)
    rows = draw(st.one_of(st.integers(1, 5), st.integers(6, 20 if interpreted else 70)))
    vocab = draw(st.one_of(st.integers(1, 40), st.integers(41, 200 if interpreted else 1500)))
    dim = draw(st.integers(1, 70))
    exact = draw(st.booleans())
    generator = random_generator(draw)

    def numbers(*shape, scale=1.0):
        x = torch.randn(*shape, generator=generator)
        return ((2 * x).round().clamp(-3, 3) if exact else scale * x).to(dtype)

    hidden = in_some_layout(draw, numbers(rows, dim))
    weight = in_some_layout(draw, numbers(vocab, dim, scale=2 * dim**-0.5))
    return hidden, weight, draw(st.sampled_from([None, numbers(vocab)])), exact


def some_ids(draw, x):
    """One id per row of x, or several; some are ignored."""
    per_row = draw(st.integers(0, 4))
    shape = (*x.shape[:-1], *([per_row] if per_row else []))
    ids = torch.randint(0, x.shape[-1], shape, generator=random_generator(draw))
    if draw(st.booleans()):
        ids[torch.rand(shape, generator=random_generator(draw)) < 0.3] = -100
    return ids.to(draw(st.sampled_from([torch.int64, torch.int32])))


def logprob_options(draw, vocab):
    return {
        "temperature": draw(st.sampled_from([1.0, 1.0, 0.1, 0.7, 3.0])),
        "top_n": draw(st.integers(0, min(20, vocab))),
    }


@st.composite
def seeds(draw, rows):
    """One (seed, offset) for all rows, or one per row."""
    if draw(st.booleans()):
        return torch.tensor([draw(st.integers(-(1 << 62), 1 << 62)), 7])
    return torch.randint(-(1 << 62), 1 << 62, (*rows, 2), generator=random_generator(draw))


def on(device, x):
    """The tensor at the same strides and alignment on the device."""
    if not isinstance(x, torch.Tensor) or x.device.type == torch.device(device).type:
        return x
    storage = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage()).to(device)
    return storage.as_strided(x.shape, x.stride(), x.storage_offset())


def fused(op, backend, arguments, keywords):
    functions, device, *_ = BACKENDS[backend]
    results = getattr(functions, op)(
        *(on(device, x) for x in arguments), **{k: on(device, x) for k, x in keywords.items()}
    )
    if torch.is_tensor(results):
        return results.cpu()
    return tuple(None if x is None else x.cpu() for x in results)


def compare(actual, expected, rtol=REFERENCE_RTOL, atol=1e-7):
    """Integers equal, floats close, shapes and dtypes the same."""
    pairs = (
        [(actual, expected)] if torch.is_tensor(expected) else zip(actual, expected, strict=True)
    )
    for have, want in pairs:
        assert (have is None) == (want is None)
        if want is not None:
            torch.testing.assert_close(have, want, rtol=rtol, atol=atol, equal_nan=True)


def check(op, backend, arguments, keywords, rtol=REFERENCE_RTOL, atol=1e-7):
    expected = getattr(reference, op)(*arguments, **keywords)
    compare(fused(op, backend, arguments, keywords), expected, rtol, atol)


def visible_in_float64(x, temperature, suppress_token):
    x = x.double().clone()
    if suppress_token >= 0:
        x[..., suppress_token] = -INF
    return x / temperature


def check_choice(token, probability, x, scores, slack, rtol=REFERENCE_RTOL):
    """``token`` has the highest of ``scores`` to ``slack``, and its probability is softmax's.

    x: float64 logits / temperature. Rows with NaN or +inf are decided by their first one.
    """
    assert token.dtype == torch.int64
    assert token.shape == probability.shape == x.shape[:-1]
    broken = x.isnan().any(dim=-1) | (x == INF).any(dim=-1) | (x == -INF).all(dim=-1)
    assert torch.equal(token[broken], x.argmax(dim=-1)[broken])
    chosen = token.unsqueeze(-1)
    missed = (scores.amax(dim=-1) - scores.gather(-1, chosen).squeeze(-1))[~broken]
    assert (missed <= slack.expand(token.shape)[~broken]).all(), missed
    expected = torch.softmax(x, dim=-1).gather(-1, chosen).squeeze(-1).masked_fill(broken, NAN)
    compare(probability.double(), expected, rtol, 1e-7)


def check_sample(sample, x, seed, error=0.0, rtol=REFERENCE_RTOL):
    """Samples of x = logits / temperature, good to ``error``, without filters. Backends may
    disagree only where two scores of the draw lie within float32's rounding."""
    token, probability, top1_probability, relative_confidence = sample
    size = x.masked_fill(~x.isfinite(), 0.0).abs().amax(dim=-1)
    slack = error + 4e-7 * (size + 25)
    everything = torch.full_like(size, INF)  # the draw is checked here, the rest as any choice
    assert_drawn(token, x, seed, slack)
    check_choice(token, probability, x, torch.zeros_like(x), everything, rtol)
    top1 = torch.softmax(x, dim=-1).amax(dim=-1)
    depth = x.gather(-1, token.unsqueeze(-1)).squeeze(-1) - x.amax(dim=-1)
    compare(top1_probability.double(), top1, rtol, 1e-7)
    relative = torch.where(top1.isnan(), NAN, torch.minimum(top1, depth.exp()))
    compare(relative_confidence.double(), relative, rtol, 1e-7)


def check_logprobs(found, x, ids, temperature, atol):
    """The log-probabilities of the ids and of the list against float64's."""
    logprob, _, top_ids, top_logprobs = found
    logprobs = torch.log_softmax(x.double() / temperature, dim=-1)
    columns = (ids if ids.dim() == x.dim() else ids.unsqueeze(-1)).long()
    wanted = logprobs.gather(-1, columns.clamp(min=0)).masked_fill(columns == -100, 0.0)
    compare(logprob.double(), wanted.view(ids.shape), 5e-6, atol)
    compare(top_logprobs.double(), logprobs.gather(-1, top_ids), 5e-6, atol)
