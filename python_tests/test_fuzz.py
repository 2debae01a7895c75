"""Random shapes, strides, dtypes and values: every op on every backend against its reference.

A few dozen examples by default; ``make fuzz`` runs a thousand (DMAX_FUZZ_EXAMPLES).
"""

import os
from types import SimpleNamespace

import float64
import pytest
import torch
from decoding_models import RandomModel, random_prompts
from fuzzing import (
    BACKENDS,
    EXAMPLES,
    FLOATS,
    NAN,
    check,
    check_choice,
    check_logprobs,
    check_sample,
    compare,
    fused,
    linear_inputs,
    logits,
    logprob_options,
    on,
    on_every_backend,
    options,
    random_generator,
    seeds,
    some_ids,
    visibility,
    visible_in_float64,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from test_linear_loss import in_float64
from tolerances import REFERENCE_RTOL, ROUNDING, assert_statistics

import dmax_kernels
from dmax_kernels import reference
from dmax_kernels.decoding import spd_generate
from dmax_kernels.ops.spd_step import SEMANTICS
from dmax_kernels.triton import IMPLEMENTATIONS
from dmax_kernels.vocabulary import shard_mask

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's inf - inf


@on_every_backend("top1_confidence", "topk_confidence")
def test_top(draw, backend, op):
    whole = draw(logits(backend))
    which, x = draw(visibility(whole))
    keywords = draw(options(x.shape[-1]))
    k = [draw(st.integers(1, min(8, x.shape[-1])))] if op == "topk_confidence" else []
    tokens, confidences = fused(op, backend, [whole, *k], keywords | which)
    assert torch.equal(tokens, getattr(reference, op)(x, *k, **keywords)[0])
    # In float64: a softmax in float32 that adds 100,000 small terms to a 1 loses some of them
    softmax = float64.softmax_of(x, **keywords)
    expected = softmax.gather(-1, tokens.reshape(*x.shape[:-1], k[0] if k else 1))
    expected = expected.reshape(tokens.shape)
    compare(confidences.double(), expected, REFERENCE_RTOL, 1e-7)


@on_every_backend()
def test_row_statistics(draw, backend):
    whole = draw(logits(backend))
    which, x = draw(visibility(whole))
    keywords = draw(options(x.shape[-1]))
    expected = float64.row_statistics(x, **keywords)
    if draw(st.booleans()):
        choices = torch.tensor([1.0, 0.1, 0.7, 3.0])
        which_one = torch.randint(4, x.shape[:-1], generator=random_generator(draw))
        keywords["temperature"] = choices[which_one]
        of_rows = {**keywords, "temperature": choices.double()[which_one].unsqueeze(-1)}
        expected = float64.row_statistics(x, **of_rows)
    # 5: at temperature 0.1 a float32 exponent of 100 is good to 1e-5
    assert_statistics(fused("row_statistics", backend, [whole], keywords | which), expected, 5.0)


@on_every_backend()
def test_token_logprobs(draw, backend):
    whole = draw(logits(backend))
    which, x = draw(visibility(whole))
    ids, keywords = some_ids(draw, x), logprob_options(draw, x.shape[-1])
    actual = fused("token_logprobs", backend, [whole, ids], keywords | which)[:4]
    expected = reference.token_logprobs(x, ids, **keywords)
    compare((actual[1], actual[2]), (expected.rank, expected.top_ids))
    check_logprobs(actual, x, ids, keywords["temperature"], 5e-6)


@on_every_backend()
def test_sample_tokens(draw, backend):
    whole = draw(logits(backend))
    which, x = draw(visibility(whole))
    keywords = draw(options(x.shape[-1]))
    seed = draw(seeds(x.shape[:-1]))
    sample = fused("sample_tokens", backend, [whole, seed], keywords | which)
    check_sample(sample, visible_in_float64(x, **keywords), seed)


@on_every_backend("top1", "sample")
def test_sharded_vocabulary(draw, backend, op):
    """The merged ids are the unsharded op's, however the vocabulary is cut."""
    x = draw(logits(backend))
    vocab = x.shape[-1]
    keywords = draw(options(vocab))
    masks = ("allowed",) if op == "top1" else ()
    which, seen = draw(visibility(x, masks))
    step = 64 if op == "sample" else 1  # a draw's tiles are not cut
    places = st.integers(1, max((vocab - 1) // step, 1))
    cuts = draw(st.lists(places, unique=True, max_size=5)) if vocab > step else []
    starts = [0, *(step * cut for cut in sorted(cuts))]
    more = [draw(seeds(x.shape[:-1]))] if op == "sample" else []
    parts = [
        fused(f"{op}_partial", backend, [shard, *more, start], keywords | {
            name: shard_mask(mask, start, shard.shape[-1]) for name, mask in which.items()
        })
        for start, shard in zip(starts, x.tensor_split(starts[1:], dim=-1), strict=True)
    ]  # fmt: skip
    stacked = [torch.stack(column) for column in zip(*parts, strict=True)]
    temperature = {"temperature": keywords["temperature"]}
    merged = fused(f"{op}_merge", backend, stacked, temperature)
    whole = {"top1": "top1_confidence", "sample": "sample_tokens"}[op]
    compare(merged, fused(whole, backend, [seen, *more], keywords)[:2])


@on_every_backend()
def test_prefix_promote(draw, backend):
    rows, block = draw(st.integers(1, 4)), draw(st.integers(1, 70))
    generator = random_generator(draw)
    confidence = (torch.rand(rows, block, generator=generator) * 4).round() / 4  # ties with tau
    confidence[torch.rand(rows, block, generator=generator) < 0.05] = NAN
    masked = torch.rand(rows, block, generator=generator) < draw(st.floats(0, 1))
    threshold = draw(st.sampled_from([0.0, 0.25, 0.5, 1.0]))
    inclusive = draw(st.booleans())
    check("prefix_promote", backend, [confidence, masked, threshold], {"inclusive": inclusive})


def hybrid_atol(embedding):
    """Opposite embeddings cancel: what is left of the mix carries their rounding, relatively."""
    return 1e-4 * (float(embedding.float().norm(dim=-1).max()) + 1e-6)


@on_every_backend()
def test_hybrid_embedding(draw, backend):
    rows, vocab = draw(st.integers(1, 5)), draw(st.integers(1, 50))
    dim, k = draw(st.integers(1, 130)), draw(st.integers(1, 4))
    dtype = draw(FLOATS)
    generator = random_generator(draw)
    embedding = torch.randn(vocab, dim, generator=generator).to(dtype)
    embedding[draw(st.integers(0, vocab - 1))] = 0
    token = torch.randint(0, vocab, (rows, k), generator=generator)
    confidence = torch.rand(rows, k, generator=generator) / k
    confidence[torch.rand(rows, k, generator=generator) < 0.2] = 1.0
    masked = torch.rand(rows, generator=generator) < 0.4
    arguments = [embedding, token, confidence, masked, draw(st.integers(0, vocab - 1))]
    atol = hybrid_atol(embedding)
    check("hybrid_embedding", backend, arguments, {}, 4 * ROUNDING[dtype], atol)


@st.composite
def block_states(draw, x, embedding):
    """Any state at all, reachable or not: rows converged before, prompts, repeated predictions."""
    batch, block, vocab = x.shape
    generator = random_generator(draw)

    def some(share, *shape):
        return torch.rand(*shape, generator=generator) < share

    editable = some(draw(st.sampled_from([0.0, 0.7, 1.0])), batch, block)
    token = torch.randint(0, vocab, (batch, block), generator=generator)
    token = torch.where(some(0.5, batch, 1), x.float().argmax(dim=-1), token)
    return {
        "editable": editable,
        "masked": editable & some(draw(st.sampled_from([0.0, 0.5, 1.0])), batch, block),
        "token": token,
        "confidence": torch.rand(batch, block, generator=generator),
        "converged": some(0.3, batch),
        "step": torch.randint(0, 3, (batch,), generator=generator, dtype=torch.int32),
        "inputs_embeds": torch.randn(batch, block, embedding.shape[1], generator=generator).to(
            embedding.dtype
        ),
    }


def undecided_rows(x, state, taus, keywords):
    """Rows where a confidence, and therefore its test, lies within rounding of a threshold."""
    _, confidence = float64.top1_confidence(x, **keywords)
    distance = (confidence.unsqueeze(-1) - taus.double().view(-1, 1, 2)).abs()
    close = ((distance > 0) & (distance < 1e-5)).any(dim=-1) & state["editable"]
    return close.any(dim=-1) & ~state["converged"]


@on_every_backend()
def test_spd_step_(draw, backend):
    shapes = ((0, 3), (1, 1), (2, 5), (3, 2), (2, 33))
    whole = draw(logits(backend, shapes[: 4 if backend == "triton" else 5], widest=300))
    which, x = draw(visibility(whole))
    vocab = x.shape[-1]
    embedding = torch.randn(vocab, draw(st.integers(1, 40)), generator=random_generator(draw))
    embedding = embedding.to(draw(FLOATS))
    expected = draw(block_states(x, embedding))
    keywords = draw(options(vocab))
    tau = st.sampled_from([-1.0, 0.0, 0.25, 0.6, 0.9, 1.0])
    taus = torch.tensor([[draw(tau), draw(tau)]])
    undecided = undecided_rows(x, expected, taus, keywords)
    keywords |= {
        "mask_token_id": draw(st.integers(0, vocab - 1)),
        "tau_dec": taus[0, 0].item(),
        "tau_acc": taus[0, 1].item(),
        "semantics": draw(st.sampled_from(SEMANTICS)),
        "top_k": draw(st.integers(1, min(8, vocab))),
    }
    if draw(st.booleans()):
        keywords["thresholds"] = taus.expand(x.shape[0], 2).contiguous()
        keywords["tau_dec"] = keywords["tau_acc"] = 0.5  # overridden
    functions, device, *_ = BACKENDS[backend]
    actual = {name: on(device, value.clone()) for name, value in expected.items()}
    reference.spd_step_(x, embedding, **expected, **keywords)
    keywords = {name: on(device, value) for name, value in (keywords | which).items()}
    functions.spd_step_(on(device, whole), on(device, embedding), **actual, **keywords)
    for name, want in expected.items():
        have = actual[name].cpu()[~undecided]
        tolerance = {}
        if name == "inputs_embeds":
            tolerance = {"rtol": 4 * ROUNDING[embedding.dtype], "atol": hybrid_atol(embedding)}
        compare(have, want[~undecided], **tolerance)


def loss_options(draw):
    return {
        "label_smoothing": draw(st.sampled_from([0.0, 0.1])),
        "z_loss": draw(st.sampled_from([0.0, 1e-4])),
        "temperature": draw(st.sampled_from([1.0, 1.0, 0.7, 3.0])),
    }


def some_targets(draw, rows, vocab):
    target = torch.randint(0, vocab, (rows,), generator=random_generator(draw))
    target[torch.arange(rows) % 3 == 2] = -100
    return target.to(draw(st.sampled_from([torch.int64, torch.int32])))


def loss_atol(x):
    """The references subtract rounded numbers of the logits' size."""
    largest = x.float().nan_to_num(0, 0, 0).abs().amax().item() if x.numel() else 0.0
    return 1e-6 + 2e-6 * largest


LOSS_SHAPES = ((0,), (1,), (3,), (5,))


@on_every_backend()
def test_oput_loss(draw, backend):
    x = draw(logits(backend, LOSS_SHAPES))
    target = some_targets(draw, *x.shape)
    other = draw(st.sampled_from([None, x.flip(0)]))
    passes = [x, other] if draw(st.booleans()) else [other, x]
    keywords = loss_options(draw)
    check("oput_loss", backend, [*passes, target], keywords, rtol=2e-5, atol=loss_atol(x))


def gradient_in_float64(x, target, grad, label_smoothing, z_loss, temperature):
    """g ((1 + 2 z lse) softmax - (1 - s) onehot - s/V) / T; 0 where ignored, NaN without a
    softmax."""
    x, ignored = x.double() / temperature, (target == -100).unsqueeze(-1)
    lse = x.logsumexp(dim=-1, keepdim=True)
    onehot = torch.zeros_like(x).scatter_(-1, target.clamp(min=0).long().unsqueeze(-1), 1.0)
    slope = (1 + 2 * z_loss * lse) * torch.softmax(x, dim=-1)
    slope = slope - (1 - label_smoothing) * onehot - label_smoothing / x.shape[-1]
    slope = slope.masked_fill(~lse.isfinite(), NAN) * grad.double().unsqueeze(-1) / temperature
    return slope.masked_fill(ignored, 0.0)


@on_every_backend()
def test_oput_loss_and_grad_(draw, backend):
    x = draw(logits(backend, LOSS_SHAPES)).contiguous()
    target = some_targets(draw, *x.shape)
    grad = torch.randn(len(target), generator=random_generator(draw))
    keywords = loss_options(draw)
    want = gradient_in_float64(x, target, grad, **keywords)
    losses = reference.oput_loss(x, x, target, **keywords)
    functions, device, *_ = BACKENDS[backend]
    target, grad = on(device, target), on(device, grad)
    written = [on(device, x.clone()) for _ in range(2)]
    actual = functions.oput_loss_and_grad_(*written, target, grad, grad, **keywords)
    compare([loss.cpu() for loss in actual], losses, rtol=2e-5, atol=loss_atol(x))
    for each in written:
        assert each.dtype == x.dtype
        compare(each.cpu().double(), want, 2 * ROUNDING[x.dtype], 1e-5)
    again = on(device, x.clone())
    alone = functions.oput_loss_and_grad_(None, again, target, None, grad, **keywords)
    assert alone[0] is None
    assert torch.equal(again.nan_to_num(7.0), written[1].nan_to_num(7.0))


NOT_LINEAR = ("cuda, emulated",)  # Triton serves the ops with a matrix product


def linear_in_float64(hidden, weight, bias):
    products = hidden.double() @ weight.double().t()
    return products if bias is None else products + bias.double()


@on_every_backend("linear_top1_confidence", "linear_sample_tokens", but=NOT_LINEAR)
def test_linear_choice(draw, backend, op):
    hidden, weight, bias, exact = draw(linear_inputs(backend))
    whole = linear_in_float64(hidden, weight, bias)
    which, x = draw(visibility(whole))
    keywords = draw(options(x.shape[-1]))
    # float32 sums of D products in any order
    size = hidden.double().abs() @ weight.double().abs().t() + 3.0
    error = 0.0 if exact else 2e-6 * size.amax(dim=-1) / keywords["temperature"]
    rtol = REFERENCE_RTOL + 4 * float(torch.as_tensor(error).max())
    x = visible_in_float64(x, **keywords)
    if op == "linear_top1_confidence":
        token, confidence = fused(op, backend, [hidden, weight, bias], keywords | which)
        check_choice(token, confidence, x, x, torch.as_tensor(error), rtol)
        if exact:
            assert torch.equal(token, x.argmax(dim=-1))  # the lowest id of a tie
    else:
        seed = draw(seeds(hidden.shape[:-1]))
        check_sample(
            fused(op, backend, [hidden, weight, seed, bias], keywords | which), x, seed, error, rtol
        )


@on_every_backend(but=NOT_LINEAR)
def test_linear_token_logprobs(draw, backend):
    """Ranks and lists where every sum is exact; elsewhere two logits may change places."""
    hidden, weight, bias, exact = draw(linear_inputs(backend))
    which, x = draw(visibility(linear_in_float64(hidden, weight, bias)))
    ids, keywords = some_ids(draw, x), logprob_options(draw, x.shape[-1])
    arguments = [hidden, weight, ids, bias]
    actual = fused("linear_token_logprobs", backend, arguments, keywords | which)[:4]
    expected = reference.token_logprobs(x, ids, **keywords)
    if exact:
        assert torch.equal(actual[1], expected.rank)
        assert torch.equal(actual[2], expected.top_ids)
    size = (hidden.double().abs() @ weight.double().abs().t() + 3.0).max().item()
    error = 0.0 if exact else 4e-6 * size / keywords["temperature"]
    check_logprobs(actual, x, ids, keywords["temperature"], 5e-6 + error)


@on_every_backend(but=NOT_LINEAR)
def test_linear_oput_loss(draw, backend):
    """Losses and every gradient of both passes, each with a separate gradient per token."""
    hidden, weight, bias, _ = draw(linear_inputs(backend))
    other = draw(st.sampled_from([None, hidden.flip(0)]))
    passes = [hidden, other] if draw(st.booleans()) else [other, hidden]
    target = some_targets(draw, len(hidden), len(weight))
    grads = torch.randn(2, len(target), generator=random_generator(draw))
    keywords = loss_options(draw)
    losses, gradients = in_float64(passes, weight, bias, target, grads, keywords)

    def run(op, *arguments):
        device = BACKENDS[backend][1]
        call = IMPLEMENTATIONS[op] if backend == "triton" else getattr(torch.ops.dmax, op)
        return call(*(on(device, x) for x in arguments), **keywords)

    results = run("linear_oput_loss", *passes, weight, target, bias)
    for loss, want in zip(results[:2], losses, strict=True):
        if want is not None:
            compare(loss.cpu().double(), want, 1e-5, 1e-5)
    actual = run("linear_oput_loss_backward", *grads, *passes, weight, target, *results[2:], bias)
    at_once = run("linear_oput_loss_sum", *passes, weight, target, bias, *grads)
    # float32 sums; the gradient of 16-bit logits is rounded to 16 bits first, as eager's is, by
    # Triton and, for bfloat16 (on a CPU with AMX or AVX512-BF16), by the CPU
    dtype = weight.dtype
    wide = dtype == torch.float32 or (backend == "cpu" and dtype == torch.float16)
    part = 1e-5 if wide else 2 * ROUNDING[dtype]
    # softmax = exp(x - logsumexp): off by the rounding of the logsumexp, even where it is 1
    logits_size = (hidden.double().abs() @ weight.double().abs().t()).max() + 5
    factor = torch.cat([hidden, weight]).abs().max().double().clamp(min=1.0)
    narrow = 0.0 if wide else ROUNDING[dtype]
    rounding = ((3e-7 * logits_size + narrow) * factor * grads.abs().sum()).item()
    for made in (actual, at_once[4:]):
        for gradient, want in zip(made, gradients, strict=True):
            if want is not None:
                atol = part * want.abs().max().item() + rounding
                compare(gradient.cpu().double(), want, 2 * ROUNDING[dtype], atol)


@given(
    rows=st.integers(1, 4),
    length=st.integers(1, 12),
    seed=st.integers(0, 1 << 16),
    block_length=st.sampled_from([4, 8]),
    tau_dec=st.sampled_from([0.0, 0.3, 0.6, 0.95]),
    tau_acc=st.sampled_from([0.5, 0.9, 1.0]),
    semantics=st.sampled_from(SEMANTICS),
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
