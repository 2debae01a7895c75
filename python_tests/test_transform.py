"""transform_logits_: soft cap, bias and penalties on every backend, against float64."""

import pytest
import simt_ops
import torch
from cases import DTYPES, logit_rows
from fuzzing import BACKENDS, everywhere, gpu_marked, on_every_backend
from hypothesis import strategies as st
from simt_ops import H200, ONE_MULTIPROCESSOR
from test_sample_options import packed
from tolerances import ROUNDING, assert_close

import dmax_kernels
from dmax_kernels import reference
from dmax_kernels.vocabulary import allowed_tokens, pack_mask

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's overflows
NAN, INF = float("nan"), float("inf")
VOCABS = (1, 7, 127, 2049, 5000)
on_backends = pytest.mark.parametrize("backend", gpu_marked(BACKENDS))


def in_float64(
    logits, *, softcap=0.0, bias=None, output_counts=None, prompt_mask=None,
    repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0,
):  # fmt: skip
    """The formulas, with every operand already one per element."""
    x = logits.double()
    if softcap:
        x = torch.where(x.isinf(), x, softcap * torch.tanh(x / softcap))
    if bias is not None:
        x = x + bias.double()
    count = torch.zeros(x.shape) if output_counts is None else output_counts.clamp(min=0).double()
    prompt_mask = torch.zeros(x.shape, dtype=torch.bool) if prompt_mask is None else prompt_mask
    r, p, f = (
        torch.as_tensor(each, dtype=torch.float32).double().expand(x.shape)
        for each in (repetition_penalty, presence_penalty, frequency_penalty)
    )
    seen = (count > 0) | prompt_mask
    x = torch.where(seen & (x > 0), x / r, torch.where(seen, x * r, x))
    return torch.where(count > 0, x - f * count - p, x)


def some_counts(shape, generator, share=0.2):
    counts = torch.randint(1, 6, shape, generator=generator)
    return (counts * (torch.rand(shape, generator=generator) < share)).int()


def some_bits(shape, generator, share=0.2):
    return torch.rand(shape, generator=generator) < share


def call(backend, logits, **options):
    functions, device = BACKENDS[backend][:2]
    moved = {k: v.to(device) if torch.is_tensor(v) else v for k, v in options.items()}
    written = logits.clone().to(device)
    functions.transform_logits_(written, **moved)
    return written.cpu()


def tolerance(backend, dtype, x, options):
    """Half a unit of the dtype, and float32's roundings at the size of the terms. Triton's
    interpreter cuts bfloat16 off instead of rounding it."""
    terms = x.nan_to_num(0, 0, 0).abs().amax().item() + 40.0 + options.get("softcap", 0.0)
    return {"rtol": ROUNDING[dtype] * (2 if backend == "triton" else 1), "atol": 1e-6 * terms}


@on_backends
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", VOCABS)
def test_values(backend, dtype, vocab):
    """NaN, infinities, ties, offsets: each alone and all together."""
    if backend == "triton" and vocab not in (7, 5000):
        return  # a tile, and several: the interpreter takes long
    generator = torch.manual_seed(vocab)
    logits = torch.stack(list(logit_rows(vocab).values())).to(dtype)
    if backend == "triton":
        logits = logits[::4].contiguous()
    bias = torch.randn(vocab, generator=generator)
    counts = some_counts(logits.shape, generator)
    mask = some_bits(logits.shape, generator)
    penalties = {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2}
    for options in (
        {"softcap": 30.0},
        {"bias": bias},
        {"softcap": 5.0, "bias": bias},
        {"output_counts": counts, **penalties},
        {"prompt_mask": mask, "repetition_penalty": 0.8},
        {"softcap": 30.0, "bias": bias, "output_counts": counts, "prompt_mask": mask, **penalties},
    ):
        expected = in_float64(logits, **options)
        given = dict(options)
        if "prompt_mask" in given:
            given["prompt_tokens"] = packed(given.pop("prompt_mask"))
        actual = call(backend, logits, **given)
        assert_close(
            actual, expected.to(dtype), **tolerance(backend, dtype, logits.float(), options)
        )


@everywhere
def test_penalties_are_vllms_to_the_bit(backend):
    """Repetition over prompt and output, then frequency times the count, then presence."""
    generator = torch.manual_seed(3)
    logits = 4 * torch.randn(5, 300, generator=generator)
    logits[0, :7] = torch.tensor([NAN, INF, -INF, 0.0, -0.0, 3e38, -3e38])
    mask, counts = some_bits((5, 300), generator), some_counts((5, 300), generator)
    r, p, f = (torch.rand(5, generator=generator) + 0.7 for _ in range(3))
    seen = mask | (counts > 0)
    expected = torch.where(logits > 0, logits / r[:, None], logits * r[:, None])
    expected = torch.where(seen, expected, logits)
    expected = expected - f[:, None] * counts
    expected = expected - p[:, None] * (counts > 0)
    options = {
        "output_counts": counts, "prompt_tokens": packed(mask),
        "repetition_penalty": r, "presence_penalty": p, "frequency_penalty": f,
    }  # fmt: skip
    if backend == "reference":
        actual = reference.transform_logits_(logits.clone(), **options)
    else:
        actual = call(backend, logits, **options)
    if backend == "triton":  # a fused product rounds once less
        assert_close(actual, expected, 1e-6, 1e-6)
    else:
        assert torch.equal(actual.nan_to_num(77.0), expected.nan_to_num(77.0))


@on_backends
@pytest.mark.parametrize("vocab", [1, 31, 33, 70, 4100])
def test_bits_past_the_vocabulary_and_counts_below_1_say_nothing(backend, vocab):
    logits = torch.linspace(-3, 3, vocab)
    words = torch.zeros(-(-vocab // 32), dtype=torch.int32)
    if vocab % 32:
        words[-1] = -1 << vocab % 32  # every bit that is no token's
    counts = torch.full((vocab,), -5, dtype=torch.int32)
    counts[vocab // 2] = 2
    options = {"repetition_penalty": 2.0, "presence_penalty": 0.5, "frequency_penalty": 0.25}
    got = call(backend, logits, output_counts=counts, prompt_tokens=words, **options)
    expected = logits.clone()
    x = logits[vocab // 2]
    expected[vocab // 2] = (x / 2 if x > 0 else x * 2) - 0.25 * 2 - 0.5
    assert torch.equal(got, expected)


@on_backends
def test_tokens_that_have_not_occurred_keep_their_bits(backend):
    """Without soft cap and bias nothing else is written, whatever is there: NaN payloads, -0."""
    bits = torch.arange(-(2**31), 2**31, 2**21 + 12345).int()
    logits = bits.view(torch.float32).expand(3, -1).contiguous()
    counts = torch.zeros(logits.shape, dtype=torch.int32)
    counts[1, 5] = counts[2, -1] = 2
    counts[0, 3] = -4  # as 0
    actual = call(backend, logits, output_counts=counts, presence_penalty=1.0)
    changed = (actual.view(torch.int32) != logits.view(torch.int32)).nonzero().tolist()
    assert all(counts[tuple(place)] > 0 for place in changed)
    assert torch.equal(actual.view(torch.int32)[0], bits)


@st.composite
def operands(draw, shape, vocab, generator):
    """Options, and what each is for every row [..., V]."""
    given, wide = {}, {}
    blocks = [(), shape, shape[:-1]] if len(shape) > 1 else [(), shape]

    def add(name, make, wide_name=None, pack=lambda x: x):
        if not draw(st.booleans()):
            return
        leading = draw(st.sampled_from(blocks))
        operand = make((*leading, vocab))
        given[name] = pack(operand)
        if leading == shape[:-1] and len(shape) > 1 and leading != ():
            operand = operand.unsqueeze(-2)
        wide[wide_name or name] = operand.expand(*shape, vocab)

    add("bias", lambda size: torch.randn(size, generator=generator))
    add("output_counts", lambda size: some_counts(size, generator))
    add("prompt_tokens", lambda size: some_bits(size, generator), "prompt_mask", packed)
    if draw(st.booleans()):
        given["softcap"] = wide["softcap"] = draw(st.sampled_from([0.5, 7.0, 50.0]))
    if not given.keys() & {"output_counts", "prompt_tokens"}:
        return given, wide
    names = ["repetition_penalty"]
    names += ["presence_penalty", "frequency_penalty"] * ("output_counts" in given)
    leading = draw(st.sampled_from([None, *blocks[1:]]))
    for name in names:
        if leading is None:
            given[name] = wide[name] = draw(st.sampled_from([0.5, 1.0, 1.7]))
        else:
            penalty = torch.rand(leading, generator=generator) + 0.5
            given[name] = penalty
            penalty = penalty if leading == shape else penalty.unsqueeze(-1)
            wide[name] = penalty.unsqueeze(-1)
    return given, wide


@on_every_backend()
def test_any_options(draw, backend):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 32)))
    shape = draw(st.sampled_from([(1,), (5,), (2, 3), (3, 1), (2, 2, 2)]))
    vocab = draw(st.integers(1, 150))
    dtype = draw(st.sampled_from(DTYPES))
    given, wide = draw(operands(shape, vocab, generator))
    # Rows of a wider tensor, that begin anywhere
    memory = torch.full((*shape, vocab + draw(st.integers(0, 9))), 77.0, dtype=dtype)
    lead = draw(st.integers(0, memory.shape[-1] - vocab))
    memory[..., lead : lead + vocab] = 3 * torch.randn(*shape, vocab, generator=generator)
    logits = memory[..., lead : lead + vocab].clone()
    expected = in_float64(logits, **wide).to(dtype)
    functions, device = BACKENDS[backend][:2]
    moved = {k: v.to(device) if torch.is_tensor(v) else v for k, v in given.items()}
    written = memory.to(device)
    functions.transform_logits_(written[..., lead : lead + vocab], **moved)
    actual = written.cpu()
    close = tolerance(backend, dtype, logits.float(), given)
    assert_close(actual[..., lead : lead + vocab], expected, **close)
    actual[..., lead : lead + vocab] = 77.0
    assert actual.eq(77.0).all()
    again = reference.transform_logits_(logits.clone(), **given)
    assert_close(again, expected, **close)


@on_backends
def test_softcap_is_accurate_near_zero_and_far(backend):
    x = torch.cat([torch.logspace(-30, 6, 400), torch.linspace(0.2, 0.3, 300)])
    x = torch.cat([x, -x]) * 3
    actual = call(backend, x[None], softcap=3.0)[0].double()
    expected = 3 * torch.tanh(x.double() / 3)
    assert ((actual - expected) / expected).abs().max() < 6e-7
    assert actual.abs().max() <= 3.0


# Rows of one block, and several: H200 is cut finely, the other coarsely
@pytest.mark.parametrize("gpu", [H200, ONE_MULTIPROCESSOR])
@pytest.mark.parametrize("vocab", [2049, 5001])
def test_kernel_cuts(gpu, vocab):
    generator = torch.manual_seed(1)
    logits = torch.randn(4, 6, vocab, generator=generator).bfloat16()
    counts = some_counts((4, vocab), generator)
    options = {"output_counts": counts, "bias": torch.randn(vocab, generator=generator)}
    penalties = {"frequency_penalty": torch.rand(4, generator=generator)}
    expected = dmax_kernels.transform_logits_(logits.clone(), **options, **penalties)
    for name in ("in order", "random"):
        with simt_ops.order(name, 1, 4):
            actual = simt_ops.transform_logits_(logits.clone(), **options, **penalties, gpu=gpu)
        assert torch.equal(actual, expected)
    columns = -(-(vocab + 7) // 2048)
    assert simt_ops.CHOSEN[-1].blocks == columns * (24 if gpu == H200 else -(-8 // columns))


def test_bits_do_not_depend_on_batch_or_threads():
    generator = torch.manual_seed(2)
    logits = torch.randn(64, 20_001, generator=generator)
    options = {"softcap": 30.0, "output_counts": some_counts((64, 20_001), generator)}
    whole = dmax_kernels.transform_logits_(logits.clone(), **options, presence_penalty=0.5)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = logits[17].clone()
        dmax_kernels.transform_logits_(
            alone, softcap=30.0, output_counts=options["output_counts"][17], presence_penalty=0.5
        )
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(alone, whole[17])


def test_masks_are_packed():
    bits = some_bits((3, 70), torch.manual_seed(1), 0.5)
    bits[0, 31] = bits[1, 63] = True
    assert torch.equal(pack_mask(bits), packed(bits))
    assert torch.equal(allowed_tokens(pack_mask(bits), 70), bits)


def test_in_place_as_pytorchs_own():
    logits = torch.randn(2, 9)
    assert dmax_kernels.transform_logits_(logits, softcap=3.0) is logits
    assert logits._version == 1
    with pytest.raises(RuntimeError, match="^transform_logits_: logits is written in place and"):
        dmax_kernels.transform_logits_(logits.requires_grad_(), softcap=3.0)
    empty = torch.empty(0, 9)
    assert dmax_kernels.transform_logits_(empty, softcap=3.0).shape == (0, 9)


X, COUNTS = torch.ones(2, 3, 40), torch.ones(2, 3, 40, dtype=torch.int32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"softcap": -1.0}, r"softcap must be 0 \(none\), or at least 1e-30 .*, got -1"),
        ({"softcap": NAN}, "softcap must be .*, got nan"),
        ({"bias": torch.ones(39)}, r"bias must have shape \[2, 40\] .*, got \[39\]|bias must have"),
        ({"bias": torch.ones(40).double()}, "bias must be float32, got float64"),
        ({"output_counts": COUNTS.long()}, "output_counts must be int32, got int64"),
        ({"output_counts": COUNTS[:1]}, r"output_counts must have shape \[2, 3, 40\]"),
        ({"prompt_tokens": torch.ones(2, 40).int()}, r"prompt_tokens must have shape \[2, 2\]"),
        ({"presence_penalty": 1.0}, "presence_penalty and frequency_penalty need output_counts"),
        ({"frequency_penalty": 0.1, "prompt_tokens": torch.ones(2).int()}, ".* need output_counts"),
        ({"repetition_penalty": 1.1}, "penalties need output_counts or prompt_tokens, got neither"),
        (
            {"output_counts": COUNTS, "repetition_penalty": 0.0},
            r"repetition_penalty must be above 0 \(1 for none\), got 0",
        ),
        (
            {"output_counts": COUNTS, "presence_penalty": INF},
            r"presence_penalty must be finite \(0 for none\), got inf",
        ),
        (
            {"output_counts": COUNTS, "penalties": torch.tensor([[1.0, 0, 0], [1, NAN, 0]])},
            "presence_penalty must be finite .*, got nan in row 1",
        ),
        (
            {"output_counts": COUNTS, "penalties": torch.ones(2, 3), "repetition_penalty": 2.0},
            "with penalties, .* defaults, got 2, 0 and 0",
        ),
        (
            {"output_counts": COUNTS, "penalties": torch.ones(3, 3)},
            r"penalties must have shape \[2, 3\]",
        ),
    ],
)
def test_refused(options, message):
    x = X.clone()
    with pytest.raises(RuntimeError, match=f"^transform_logits_: {message}"):
        torch.ops.dmax.transform_logits_(x, **options)
    assert torch.equal(x, X)


def test_refused_memory():
    with pytest.raises(RuntimeError, match="^transform_logits_: logits is written in place: its"):
        dmax_kernels.transform_logits_(torch.ones(4, 5).t(), softcap=1.0)
    memory = torch.ones(8)
    with pytest.raises(RuntimeError, match="logits .* got overlap with bias"):
        dmax_kernels.transform_logits_(memory[:4].view(1, 4), bias=memory[2:6])
    with pytest.raises(ValueError, match="presence_penalty must be .* as repetition_penalty, got"):
        dmax_kernels.transform_logits_(
            X.clone(), output_counts=COUNTS, repetition_penalty=torch.ones(2),
            presence_penalty=torch.ones(3),
        )  # fmt: skip
