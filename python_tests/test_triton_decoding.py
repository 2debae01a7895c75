"""The Triton decoding ops against the C++ ones, id for id; under the interpreter without a GPU.

The interpreter takes some 10 ms per program, so that the vocabularies here are as small as the
paths through the kernels allow. Those are: one tile or several, a last tile that is whole or cut.
"""

import importlib

import pytest
import torch
from cases import stacked_rows, strided_copies
from tolerances import CONFIDENCE_RTOL, ROUNDING, assert_close
from triton_device import DEVICE, cpp_op, triton_op

from dmax_kernels.ops.spd_step import SEMANTICS
from dmax_kernels.reference.sample import exponential_noise
from dmax_kernels.triton import launch

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's inf - inf

TILE = launch.TILE
# Alone; inside one tile; one whole tile; whole tiles and a cut one. 16-bit floats: a further cut
# tile, since what differs is the conversion and the ties their rounding makes
CASES = (
    (1, torch.float32),
    (7, torch.float32),
    (TILE, torch.float32),
    (2 * TILE + 801, torch.float32),
    (127, torch.bfloat16),
    (2 * TILE + 800, torch.bfloat16),
    (127, torch.float16),
)
WIDE = 2 * TILE + 801


# Both sides round to the output's dtype (Triton's interpreter cuts bfloat16 off instead)
TWO_ROUNDINGS = {dtype: 2 * rounding for dtype, rounding in ROUNDING.items()}


# A confidence below float32's normal range may be flushed to 0
def assert_equal_ids(actual, expected, names, rtol=CONFIDENCE_RTOL):
    tokens, confidences = actual
    expected_tokens, expected_confidences = expected
    same = (tokens == expected_tokens).reshape(len(names), -1).all(dim=1).tolist()
    assert not [name for name, equal in zip(names, same, strict=True) if not equal]
    assert_close(confidences, expected_confidences, rtol, atol=1e-37)


@pytest.mark.parametrize(("vocab_size", "dtype"), CASES)
def test_top1_confidence(vocab_size, dtype):
    names, logits = stacked_rows(vocab_size, dtype)
    assert_equal_ids(triton_op("top1_confidence", logits), cpp_op("top1_confidence", logits), names)


# First, the winner of some rows, at a tile's edges, last; and no recompilation on the way
@pytest.mark.parametrize("suppress_token", [0, 6, TILE - 1, TILE, WIDE - 1])
def test_suppressed_token(suppress_token):
    names, logits = stacked_rows(WIDE, torch.float32)
    chosen = [names.index(n) for n in ("peaked", "nans", "infs", "tie_first_and_last", "nan_last")]
    logits, names = logits[chosen], [names[i] for i in chosen]
    options = {"suppress_token": suppress_token, "temperature": 0.7}
    assert_equal_ids(
        triton_op("top1_confidence", logits, **options),
        cpp_op("top1_confidence", logits, **options),
        names,
    )


def test_only_token_suppressed():
    token, confidence = triton_op("top1_confidence", torch.ones(2, 1), suppress_token=0)
    assert token.tolist() == [0, 0]
    assert confidence.isnan().all()


@pytest.mark.parametrize("temperature", [1e-30, 0.1, 3.0])
def test_temperature(temperature):
    names, logits = stacked_rows(127, torch.float32)
    assert_equal_ids(
        triton_op("top1_confidence", logits, temperature=temperature),
        cpp_op("top1_confidence", logits, temperature=temperature),
        names,
    )


def test_strides_and_shapes():
    _, logits = stacked_rows(40, torch.bfloat16)
    logits = logits[:4]
    expected = cpp_op("top1_confidence", logits)
    for name, copy in strided_copies(logits).items():
        actual = triton_op("top1_confidence", copy)
        assert torch.equal(actual[0], expected[0]), name
        assert_close(actual[1], expected[1], CONFIDENCE_RTOL)
    logits = torch.randn(2, 3, 40)
    token, confidence = triton_op("top1_confidence", logits.transpose(0, 1))
    assert token.shape == confidence.shape == (3, 2)
    assert torch.equal(token, logits.argmax(-1).t())
    expanded = logits[:1].expand(4, 3, 40)  # stride 0
    assert torch.equal(triton_op("top1_confidence", expanded)[0], expanded.argmax(-1))
    assert triton_op("top1_confidence", logits[0, 0])[0].shape == ()
    assert triton_op("top1_confidence", logits[:0])[0].shape == (0, 3)


# Batch invariance: rows alone are one tile per program, 40 rows several (see choose_tiles)
@pytest.mark.parametrize("op", ["top1_confidence", "oput_loss"])
def test_same_row_same_bits(op):
    logits = 3 * torch.randn(40, WIDE, generator=torch.manual_seed(3))
    target = torch.arange(40) * 7

    def rows(some):
        if op == "oput_loss":
            return triton_op(op, logits[some], None, target[some])[0]
        return triton_op(op, logits[some])[1]

    if DEVICE.type == "cpu":
        assert launch.choose_tiles(1, WIDE, DEVICE).per_program == 1
        assert launch.choose_tiles(40, WIDE, DEVICE).per_program == 3
    everything = rows(slice(0, 40))
    for some in (slice(7, 8), slice(5, 8), slice(32, 40)):
        assert torch.equal(rows(some), everything[some])


TOPK_ROWS = (
    "normal", "flat", "tie_across_tiles", "signed_zeros", "nans", "nan_beside_inf", "infs",
    "minus_inf_but_last", "all_minus_inf",
)  # fmt: skip


@pytest.mark.parametrize(("vocab_size", "dtype", "k"), [
    (1, torch.float32, 1),
    (7, torch.float32, 7),
    (127, torch.bfloat16, 8),
    (WIDE, torch.float32, 3),
])  # fmt: skip
def test_topk_confidence(vocab_size, dtype, k):
    names, logits = stacked_rows(vocab_size, dtype)
    chosen = [i for i, name in enumerate(names) if name in TOPK_ROWS]
    names, logits = [names[i] for i in chosen], logits[chosen]
    options = {"suppress_token": vocab_size - 1, "temperature": 0.7}
    assert_equal_ids(
        triton_op("topk_confidence", logits, k, **options),
        cpp_op("topk_confidence", logits, k, **options),
        names,
        rtol=4e-6,  # of small probabilities: one more exponential than the top-1
    )


def test_topk_candidates_of_a_short_last_tile():
    """The last tile holds 2 logits but offers k = 4 candidates, of which 2 are none."""
    logits = torch.full((1, TILE + 2), -torch.inf)
    logits[0, TILE + 1] = 1.0
    tokens, confidences = triton_op("topk_confidence", logits, 4)
    assert tokens.tolist() == [[TILE + 1, 0, 1, 2]]
    assert confidences.tolist() == [[1, 0, 0, 0]]


# ---- Vocabulary shards


@pytest.mark.parametrize("sizes", [(WIDE,), (127, WIDE - 127 - 1, 1)])
def test_shards(sizes):
    names, logits = stacked_rows(WIDE, torch.float32)
    options = {"temperature": 0.7, "suppress_token": 5}
    start, shards = 0, []
    for size in sizes:
        shard = logits[:, start : start + size]
        partial = triton_op("top1_partial", shard, start, **options)
        expected = cpp_op("top1_partial", shard, start, **options)
        assert torch.equal(partial[2], expected[2])
        assert_close(partial[0], expected[0], 0)
        assert_close(partial[1], expected[1], CONFIDENCE_RTOL)
        shards.append(partial)
        start += size
    stacked = [torch.stack(parts) for parts in zip(*shards, strict=True)]
    merged = triton_op("top1_merge", *stacked, temperature=0.7)
    assert_equal_ids(merged, cpp_op("top1_merge", *stacked, temperature=0.7), names)
    assert_equal_ids(
        merged, cpp_op("top1_confidence", logits, **options), names, 2 * CONFIDENCE_RTOL
    )


def test_partial_without_logits_in_reach():
    shard = torch.full((1, 3), -torch.inf)
    maximum, sum_exp, token = triton_op("top1_partial", shard, 1 << 40)
    assert (maximum.item(), sum_exp.item(), token.item()) == (-torch.inf, 0, 1 << 40)


# ---- Sampling


def assert_same_samples(logits, seed, **options):
    """Equal ids, but where the two best scores lie within rounding of each other."""
    token, probability = triton_op("sample_tokens", logits, seed, **options)
    expected, expected_probability = cpp_op("sample_tokens", logits, seed, **options)
    x = logits.float() / options.get("temperature", 1.0)
    score = x - exponential_noise(seed, logits.shape[:-1], logits.shape[-1]).log()
    gap = score.gather(-1, expected.unsqueeze(-1)) - score.gather(-1, token.unsqueeze(-1))
    differs = token != expected
    assert (gap.squeeze(-1)[differs].abs() <= 1e-5).all()
    assert differs.sum() <= 0.05 * differs.numel()
    assert_close(probability[~differs], expected_probability[~differs], 4e-6, atol=1e-37)


# A seed per call, where the row enters the counter; and large, negative ones per row
@pytest.mark.parametrize(
    ("vocab_size", "per_row"), [(1, False), (7, True), (127, False), (WIDE, True)]
)
def test_sample_tokens(vocab_size, per_row):
    _, logits = stacked_rows(vocab_size, torch.float32)
    seed = torch.tensor([1234567890123456789, 42])
    if per_row:
        seed = torch.randint(-(2**62), 2**62, (len(logits), 2), generator=torch.manual_seed(2))
    assert_same_samples(logits, seed, temperature=0.7, suppress_token=vocab_size - 1)


def test_sample_does_not_depend_on_the_place_in_the_batch():
    logits = torch.randn(6, 127, generator=torch.manual_seed(4))
    seed = torch.arange(12).view(6, 2)
    token, _ = triton_op("sample_tokens", logits, seed)
    for i in (0, 5):
        assert triton_op("sample_tokens", logits[i], seed[i][None][0])[0].shape == ()
        assert triton_op("sample_tokens", logits[i : i + 1], seed[i : i + 1])[0] == token[i]


# Starts with every remainder of 4: four adjacent ids then need the words of one counter or of two
@pytest.mark.parametrize("sizes", [(1, 1, 1, 130), (TILE + 6, 127)])
def test_sample_of_shards(sizes):
    names, logits = stacked_rows(sum(sizes), torch.float32)
    seed = torch.tensor([1234567890123456789, 42])
    options = {"temperature": 0.7, "suppress_token": 5}
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    parts = [
        triton_op("sample_partial", shard, seed, start, **options)
        for shard, start in zip(logits.split(sizes, dim=1), starts, strict=True)
    ]
    stacked = [torch.stack(part) for part in zip(*parts, strict=True)]
    merged = triton_op("sample_merge", *stacked, temperature=0.7)
    assert_equal_ids(merged, triton_op("sample_tokens", logits, seed, **options), names, 4e-6)
    assert_equal_ids(merged, cpp_op("sample_merge", *stacked, temperature=0.7), names, 4e-6)


def test_greedy_sampling_is_top1():
    names, logits = stacked_rows(127, torch.float32)
    greedy = triton_op("sample_tokens", logits, torch.tensor([1, 2]), temperature=0.0)
    assert_equal_ids(greedy, cpp_op("top1_confidence", logits), names)


# ---- Promotion, embeddings, the step


# 1,030: more than one chunk of positions, with the first failure in the first or the second
@pytest.mark.parametrize("block", [1, 31, 32, 33, 1030])
@pytest.mark.parametrize("inclusive", [False, True])
def test_prefix_promote(block, inclusive):
    generator = torch.manual_seed(block)
    confidence = torch.rand(8, block, generator=generator)
    masked = torch.rand(8, block, generator=generator) < 0.7
    masked[0], masked[1] = True, False
    confidence[0] = 0.9
    confidence[0, block // 2] = torch.nan
    confidence[2, ::3] = 0.5  # equal to the threshold
    confidence[3] = 0.95
    confidence[3, -1] = 0.1
    for threshold in (0.0, 0.5, 1.5):
        actual = triton_op("prefix_promote", confidence, masked, threshold, inclusive=inclusive)
        expected = cpp_op("prefix_promote", confidence, masked, threshold, inclusive=inclusive)
        assert torch.equal(actual, expected)


def hybrid_inputs(dtype, dim, k, shape=(2, 6)):
    generator = torch.manual_seed(dim + (k or 0))
    embedding = torch.randn(40, dim, generator=generator).to(dtype)
    embedding[3] = 0
    shape_k = shape if k is None else (*shape, k)
    token = torch.randint(0, 9, shape_k, generator=generator)
    confidence = torch.rand(shape_k, generator=generator) / (k or 1)
    masked = torch.rand(shape, generator=generator) < 0.3
    return embedding, token, confidence, masked, 5


# D: 1, a cut chunk, one whole chunk, several chunks with a cut one
@pytest.mark.parametrize("k", [None, 1, 3])
@pytest.mark.parametrize(("dim", "dtype"), [
    (1, torch.float32), (7, torch.bfloat16), (1024, torch.float32), (1500, torch.float16),
])  # fmt: skip
def test_hybrid_embedding(dim, dtype, k):
    inputs = hybrid_inputs(dtype, dim, k)
    inputs[2].view(-1)[0] = torch.nan
    actual = triton_op("hybrid_embedding", *inputs)
    assert_close(actual, cpp_op("hybrid_embedding", *inputs), TWO_ROUNDINGS[dtype], 2e-6)


def test_certain_and_masked_positions_are_exact():
    embedding, token, _, _, mask = hybrid_inputs(torch.bfloat16, 100, None)
    embedding[mask] = torch.inf  # must not enter where the confidence is 1
    masked = torch.zeros_like(token, dtype=torch.bool)
    masked[0] = True
    token[masked] = -1  # not read where masked
    actual = triton_op("hybrid_embedding", embedding, token, torch.ones(2, 6), masked, mask)
    assert torch.equal(actual[1], embedding[token[1]])
    assert (actual[0] == torch.inf).all()


def test_unknown_token_gives_a_nan_row():
    """Where the CPU raises an error, the GPU cannot; nothing outside the table is read."""
    embedding, token, confidence, masked, mask = hybrid_inputs(torch.float32, 8, None)
    masked[:] = False
    token[0, 0], token[1, 2] = 40, -1
    actual = triton_op("hybrid_embedding", embedding, token, confidence, masked, mask)
    nan_rows = actual.isnan().all(-1)
    assert nan_rows.nonzero().tolist() == [[0, 0], [1, 2]]
    assert actual[~nan_rows].isfinite().all()


# Spans of 5 positions: more than one partial sum of the mask embedding, the last of them cut; token
# 5 is the mask token itself
@pytest.mark.parametrize(("dim", "dtype", "k"), [
    (7, torch.float32, None), (1500, torch.bfloat16, 2),
])  # fmt: skip
def test_hybrid_embedding_backward(monkeypatch, dim, dtype, k):
    monkeypatch.setattr(
        importlib.import_module("dmax_kernels.triton.embedding"), "MASK_SPAN", 5
    )
    inputs = hybrid_inputs(dtype, dim, k)
    grad_output = torch.randn(2, 6, dim, generator=torch.manual_seed(1)).to(dtype)
    grads = triton_op("hybrid_embedding_backward", grad_output, *inputs)
    expected = cpp_op("hybrid_embedding_backward", grad_output, *inputs)
    for grad, wanted in zip(grads, expected, strict=True):
        scale = wanted.double().abs().max().item()
        rounding = TWO_ROUNDINGS[dtype] if grad is grads[0] else 1e-5
        assert_close(grad, wanted, rounding, 1e-5 * scale)
    again = triton_op("hybrid_embedding_backward", grad_output, *inputs)
    assert all(torch.equal(a, b) for a, b in zip(grads, again, strict=True))


def spd_state(batch, block, vocab_size, dim, dtype):
    generator = torch.manual_seed(block)
    editable = torch.rand(batch, block, generator=generator) < 0.8
    editable[-1] = False  # a row with nothing to decode
    prompt = torch.randint(0, vocab_size, (batch, block), generator=generator)
    return {
        "editable": editable,
        "masked": editable.clone(),
        "token": torch.where(editable, vocab_size - 1, prompt),
        "confidence": (~editable).float(),
        "converged": torch.zeros(batch, dtype=torch.bool),
        "step": torch.zeros(batch, dtype=torch.int32),
        "inputs_embeds": torch.randn(batch, block, dim, generator=generator).to(dtype),
    }


# A whole trajectory until all rows have converged: each kernel sees every state there is
@pytest.mark.parametrize("semantics", range(len(SEMANTICS)), ids=SEMANTICS)
@pytest.mark.parametrize(("top_k", "dtype", "per_row"), [
    (1, torch.float32, False), (1, torch.bfloat16, True), (3, torch.float32, True),
])  # fmt: skip
def test_spd_step_trajectory(semantics, top_k, dtype, per_row):
    batch, block, vocab_size, dim = 3, 5, 30, 16
    generator = torch.manual_seed(5)
    embedding = torch.randn(vocab_size, dim, generator=generator).to(dtype)
    expected = spd_state(batch, block, vocab_size, dim, dtype)
    actual = {name: t.clone().to(DEVICE) for name, t in expected.items()}
    base = 3 * torch.randn(batch, block, vocab_size, generator=generator)
    thresholds = torch.rand(batch, 2, generator=generator) if per_row else None
    options = {"semantics": semantics, "top_k": top_k, "suppress_token": 2, "temperature": 0.8}
    for step in range(4):
        noise = 0.5 * torch.randn(base.shape, generator=generator) if step < 2 else 0
        logits = (base + noise).to(dtype)
        logits[0, 2, 4] = torch.nan if step < 1 else 0  # a NaN is never promoted
        arguments = (vocab_size - 1, 0.5, 0.9)
        cpp_op("spd_step_", logits, embedding, *expected.values(), *arguments,
               thresholds=thresholds, **options)  # fmt: skip
        triton_op("spd_step_", logits, embedding, *actual.values(), *arguments,
                  thresholds=thresholds, **options)  # fmt: skip
        for name in ("masked", "token", "converged", "step"):
            assert torch.equal(actual[name].cpu(), expected[name]), name
        assert_close(actual["confidence"].cpu(), expected["confidence"], 4e-6)
        embeds = actual["inputs_embeds"].cpu()
        assert_close(embeds, expected["inputs_embeds"], TWO_ROUNDINGS[dtype], 4e-6)
    assert expected["converged"].any()


def test_spd_step_leaves_converged_rows_alone():
    """Not even their logits are read: here they would turn everything into NaN."""
    embedding = torch.randn(30, 16)
    state = {name: t.to(DEVICE) for name, t in spd_state(2, 33, 30, 16, torch.float32).items()}
    state["converged"][0] = True
    before = {name: t.clone() for name, t in state.items()}
    logits = torch.full((2, 33, 30), torch.nan)
    logits[1] = torch.randn(33, 30)
    triton_op("spd_step_", logits, embedding, *state.values(), 29, 0.5, 0.9)
    for name, tensor in state.items():
        assert torch.equal(tensor[0], before[name][0]), name
    assert state["step"].tolist() == [0, 1]


def test_empty_inputs():
    assert triton_op("topk_confidence", torch.ones(0, 9), 2)[0].shape == (0, 2)
    assert triton_op("sample_tokens", torch.ones(2, 0, 9), torch.tensor([1, 2]))[0].shape == (2, 0)
    assert triton_op("top1_partial", torch.ones(0, 9), 0)[0].shape == (0,)
    empty = torch.ones(3, 0)
    assert triton_op("top1_merge", empty, empty, empty.long())[0].shape == (0,)
    assert triton_op("prefix_promote", empty, empty.bool(), 0.5).shape == (3, 0)
    hybrid = (torch.ones(4, 6), empty.long(), empty, empty.bool(), 0)
    assert triton_op("hybrid_embedding", *hybrid).shape == (3, 0, 6)
    grads = triton_op("hybrid_embedding_backward", torch.ones(3, 0, 6), *hybrid)
    assert (grads[0] == 0).all()
    assert grads[1].shape == (3, 0)
