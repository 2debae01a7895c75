"""top1_confidence, topk_confidence and their vocabulary shards; CUDA's are in test_simt_rows.py."""

import float64
import pytest
import torch
from cases import DTYPES, LARGE_VOCABS, SMALL_VOCABS, stacked_rows, strided_copies
from tolerances import CONFIDENCE_RTOL, REFERENCE_RTOL, assert_close
from triton_device import DEVICE, triton

import dmax_kernels
from dmax_kernels import reference
from dmax_kernels.triton.launch import TILE, choose_tiles

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's inf - inf

BACKENDS = {"reference": reference, "cpu": dmax_kernels, "triton": triton}
RTOL = {"reference": REFERENCE_RTOL, "cpu": CONFIDENCE_RTOL, "triton": CONFIDENCE_RTOL}
everywhere = pytest.mark.parametrize("backend", BACKENDS)
compiled = pytest.mark.parametrize("backend", ["cpu", "triton"])
WIDE = 2 * TILE + 801
# Alone; inside one tile; one whole tile; whole tiles and a cut one. One size for each 16-bit float,
# since only the conversion and the ties from rounding differ
TRITON_CASES = [
    *((v, torch.float32) for v in (1, 7, TILE, WIDE)),
    *((127, torch.bfloat16), (WIDE - 1, torch.bfloat16), (127, torch.float16)),
]


def some_rows(backend, names, logits, *chosen):
    """All rows, or for Triton's slow interpreter the chosen ones."""
    if backend != "triton":
        return names, logits
    return list(chosen), logits[[names.index(name) for name in chosen]]


def assert_top1(backend, names, actual, expected):
    (token, confidence), (expected_token, expected_confidence) = actual, expected
    wrong = token != expected_token
    assert not [name for name, is_wrong in zip(names, wrong.tolist(), strict=True) if is_wrong]
    assert token.dtype == torch.int64
    assert confidence.dtype == torch.float32
    assert_close(confidence, expected_confidence, RTOL[backend])


# Every edge case in every dtype at every small V: tails, tiles, ties at each level of the reduction
@pytest.mark.parametrize(
    ("backend", "vocab_size", "dtype"),
    [(b, v, d) for b in ("reference", "cpu") for v in SMALL_VOCABS for d in DTYPES]
    + [("triton", *case) for case in TRITON_CASES],
)
def test_top1_values(backend, vocab_size, dtype):
    names, logits = stacked_rows(vocab_size, dtype)
    actual = BACKENDS[backend].top1_confidence(logits)
    assert_top1(backend, names, actual, float64.top1_confidence(logits))


# The real vocabulary, aligned and odd; three rows take the tiled path, eight the row path
@pytest.mark.parametrize("num_rows", [1, 3, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", LARGE_VOCABS)
def test_top1_large_vocabulary(num_rows, dtype, vocab_size):
    logits = (3 * torch.randn(num_rows, vocab_size, generator=torch.manual_seed(1))).to(dtype)
    token, confidence = dmax_kernels.top1_confidence(logits)
    assert torch.equal(token, logits.float().argmax(dim=-1))
    assert_close(confidence, float64.softmax_of(logits).amax(dim=-1), CONFIDENCE_RTOL)


@everywhere
@pytest.mark.parametrize("temperature", [1e-30, 1e-3, 0.7, 5.0, 1e6])
def test_temperature(backend, temperature):
    names, logits = stacked_rows(127 if backend == "triton" else 5000, torch.float32)
    token, confidence = BACKENDS[backend].top1_confidence(logits, temperature=temperature)
    expected_token, expected = float64.top1_confidence(logits, temperature)
    assert torch.equal(token, expected_token)
    if temperature >= 1e-3:
        assert_close(confidence, expected, RTOL[backend])
    else:  # at 1e-30 float64 itself only knows one winner
        by_name = dict(zip(names, confidence.tolist(), strict=True))
        assert all(by_name[name] == 1.0 for name in ("normal", "peaked", "large_offset"))
        ties = ("flat", "tie_of_neighbours", "tie_across_vectors", "tie_first_and_last")
        assert all(by_name[name] <= 0.5 for name in ties)


# First, last, the winner itself, one inside a vector, those at the edges of both tiles
@everywhere
@pytest.mark.parametrize("suppress_token", [0, 3, 6, 2047, 2048, TILE - 1, TILE, WIDE - 1])
def test_suppressed_token(backend, suppress_token):
    chosen = ("peaked", "nans", "infs", "tie_first_and_last", "nan_last")
    names, logits = some_rows(backend, *stacked_rows(WIDE, torch.float32), *chosen)
    options = {"suppress_token": suppress_token, "temperature": 0.7}
    actual = BACKENDS[backend].top1_confidence(logits, **options)
    assert_top1(backend, names, actual, float64.top1_confidence(logits, **options))


@everywhere
def test_only_token_suppressed(backend):
    token, confidence = BACKENDS[backend].top1_confidence(torch.ones(2, 1), suppress_token=0)
    assert token.tolist() == [0, 0]
    assert confidence.isnan().all()


@compiled
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(backend, dtype):
    _, logits = stacked_rows(2049, dtype)
    if backend == "triton":
        logits = logits[:4, :40]
    op = BACKENDS[backend].top1_confidence
    expected_token, expected = op(logits)
    for name, copy in strided_copies(logits).items():
        token, confidence = op(copy)
        assert torch.equal(token, expected_token), name
        # Triton's compiler may choose a different order of summation for a different alignment
        assert_close(confidence, expected, 0 if backend == "cpu" else CONFIDENCE_RTOL)


@compiled
def test_leading_shapes(backend):
    op = BACKENDS[backend].top1_confidence
    logits = torch.randn(2, 3, 4, 50)
    token, confidence = op(logits)
    assert token.shape == confidence.shape == (2, 3, 4)
    assert op(logits[0, 0, 0])[0].shape == ()
    assert op(logits[:0])[0].shape == (0, 3, 4)
    expanded = logits[:1].expand(5, 3, 4, 50)  # stride 0
    assert torch.equal(op(expanded)[0], token[:1].expand(5, 3, 4))
    shuffled = logits.permute(2, 0, 1, 3)  # rows at no common stride
    assert torch.equal(op(shuffled)[0], token.permute(2, 0, 1))


# Batch invariance: alone, among 3 (tiled path) and among 64 (row path), on any number of threads
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_row_same_bits(dtype):
    logits = (3 * torch.randn(64, 157184, generator=torch.manual_seed(2))).to(dtype)
    token, confidence = dmax_kernels.top1_confidence(logits)
    threads = torch.get_num_threads()
    try:
        for num_threads in (1, 2, 5):
            torch.set_num_threads(num_threads)
            for rows in (slice(7, 8), slice(5, 8), slice(0, 64)):
                token_again, confidence_again = dmax_kernels.top1_confidence(logits[rows])
                assert torch.equal(token_again, token[rows])
                assert torch.equal(confidence_again, confidence[rows])
    finally:
        torch.set_num_threads(threads)


def test_same_row_same_bits_on_triton():
    logits = 3 * torch.randn(40, WIDE, generator=torch.manual_seed(3))
    if DEVICE.type == "cpu":  # one tile per program, and several
        assert choose_tiles(1, WIDE, DEVICE).per_program == 1
        assert choose_tiles(40, WIDE, DEVICE).per_program == 3
    _, confidence = triton.top1_confidence(logits)
    for rows in (slice(7, 8), slice(5, 8), slice(32, 40)):
        assert torch.equal(triton.top1_confidence(logits[rows])[1], confidence[rows])


def test_more_than_2_to_31_elements():
    """Row offsets are 64-bit: 2,200 rows at a stride of 1,000,001 elements, of a small buffer."""
    rows, stride, vocab_size = 2200, 1_000_001, 64
    try:
        buffer = torch.empty(rows * stride, dtype=torch.bfloat16)  # untouched pages cost nothing
    except RuntimeError:
        pytest.skip("no address space for a 4.4 GB buffer")
    logits = buffer.as_strided((rows, vocab_size), (stride, 1))
    logits.copy_(torch.randn(rows, vocab_size))
    token, _ = dmax_kernels.top1_confidence(logits)
    assert torch.equal(token, logits.float().argmax(dim=-1))


def test_no_gradient_is_an_error():
    logits = torch.randn(3, 8, requires_grad=True)
    _, confidence = dmax_kernels.top1_confidence(logits)
    with pytest.raises(RuntimeError, match=r"top1_confidence: has no gradient; detach the logits"):
        confidence.sum().backward()


# ---- topk_confidence


def by_definition(row, k, suppress_token=-1):
    """Ids by (NaN first, value descending, id ascending), sorted in plain Python."""
    values = row.double().tolist()
    if suppress_token >= 0:
        values[suppress_token] = float("-inf")
    order = sorted(
        range(len(values)),
        key=lambda i: (0, 0.0, i) if values[i] != values[i] else (1, -values[i], i),
    )
    return order[:k]


# k = 1 is the top-1, 8 the largest; V = 1 and 7 leave fewer than 8 tokens
@pytest.mark.parametrize(
    ("backend", "vocab_size", "dtype", "k"),
    [
        (b, v, d, k)
        for b in ("reference", "cpu")
        for v in SMALL_VOCABS
        for d in DTYPES
        for k in (1, 3, 8)
    ]
    + [
        ("triton", 1, torch.float32, 1),
        ("triton", 7, torch.float32, 8),
        ("triton", 127, torch.bfloat16, 8),
        ("triton", WIDE, torch.float32, 3),
    ],
)
def test_topk_values(backend, vocab_size, dtype, k):
    k = min(k, vocab_size)
    chosen = ("normal", "flat", "tie_across_tiles", "signed_zeros", "nans", "nan_beside_inf")
    chosen += ("infs", "minus_inf_but_last", "all_minus_inf")
    names, logits = some_rows(backend, *stacked_rows(vocab_size, dtype), *chosen)
    tokens, confidences = BACKENDS[backend].topk_confidence(logits, k, temperature=0.9)
    probability = float64.softmax_of(logits, 0.9)
    for i, name in enumerate(names):
        assert tokens[i].tolist() == by_definition(logits[i], k), name
    expected = probability.gather(-1, tokens)
    undefined = probability.isnan().any(dim=-1, keepdim=True)
    # Float32's smallest numbers may be flushed to 0
    assert_close(confidences, expected.masked_fill(undefined, torch.nan), REFERENCE_RTOL, 1e-37)


def test_first_of_topk_is_top1():
    _, logits = stacked_rows(5000, torch.bfloat16)
    token, confidence = dmax_kernels.top1_confidence(logits, temperature=0.7)
    tokens, confidences = dmax_kernels.topk_confidence(logits, 4, temperature=0.7)
    assert torch.equal(tokens[:, 0], token)
    assert torch.equal(confidences[:, 0].nan_to_num(), confidence.nan_to_num())


# A suppressed winner, a suppressed token among the first k, and lists that only it can fill up
@everywhere
@pytest.mark.parametrize(("vocab_size", "k", "suppressed"), [(5000, 8, 3), (9, 8, 2), (4, 4, 0)])
def test_topk_suppressed_token(backend, vocab_size, k, suppressed):
    chosen = ("peaked", "nans", "infs", "tie_first_and_last")
    names, logits = some_rows(backend, *stacked_rows(vocab_size, torch.float32), *chosen)
    tokens, confidences = BACKENDS[backend].topk_confidence(logits, k, suppress_token=suppressed)
    for i, name in enumerate(names):
        assert tokens[i].tolist() == by_definition(logits[i], k, suppressed), name
    assert (confidences[tokens == suppressed].nan_to_num() == 0).all()


@everywhere
def test_topk_candidates_of_a_short_last_tile(backend):
    """Triton's last tile holds 2 logits but offers k = 4 candidates, of which 2 are none."""
    logits = torch.full((1, TILE + 2), -torch.inf)
    logits[0, TILE + 1] = 1.0
    tokens, confidences = BACKENDS[backend].topk_confidence(logits, 4)
    assert tokens.tolist() == [[TILE + 1, 0, 1, 2]]
    assert confidences.tolist() == [[1, 0, 0, 0]]


@pytest.mark.parametrize("num_rows", [1, 8])
def test_topk_large_vocabulary(num_rows):
    logits = 3 * torch.randn(num_rows, 157184, generator=torch.manual_seed(3))
    tokens, confidences = dmax_kernels.topk_confidence(logits, 8)
    expected_tokens, _ = reference.topk_confidence(logits, 8)
    assert torch.equal(tokens, expected_tokens)
    expected = float64.softmax_of(logits).gather(-1, tokens)
    assert_close(confidences, expected, CONFIDENCE_RTOL)


def test_topk_strides_and_shapes():
    _, logits = stacked_rows(2049, torch.float16)
    expected, _ = dmax_kernels.topk_confidence(logits, 5)
    for name, copy in strided_copies(logits).items():
        assert torch.equal(dmax_kernels.topk_confidence(copy, 5)[0], expected), name
    for functions in BACKENDS.values():
        assert functions.topk_confidence(torch.ones(0, 4, 9), 2)[0].shape == (0, 4, 2)
        assert functions.topk_confidence(torch.ones(9), 2)[0].tolist() == [0, 1]


# ---- Vocabulary shards


def sharded_top1(functions, logits, widths, **options):
    """As on tensor-parallel ranks: each has its columns, then the merge."""
    starts = [sum(widths[:i]) for i in range(len(widths))]
    partials = [
        functions.top1_partial(shard, start, **options)
        for shard, start in zip(logits.split(widths, dim=-1), starts, strict=True)
    ]
    stacked = (torch.stack(field) for field in zip(*partials, strict=True))
    return functions.top1_merge(*stacked, temperature=options.get("temperature", 1.0))


def assert_sharded(backend, names, logits, widths, **options):
    token, confidence = sharded_top1(BACKENDS[backend], logits, widths, **options)
    expected_token, expected = float64.top1_confidence(logits, **options)
    assert not [names[i] for i in (token != expected_token).nonzero()[:, 0]]
    assert_close(confidence, expected, max(RTOL[backend], 2 * CONFIDENCE_RTOL))


# One shard, even shards, uneven shards, shards of one token; every edge case, in every dtype
@pytest.mark.parametrize(
    ("backend", "dtype", "widths"),
    [
        (b, d, w)
        for b in ("reference", "cpu")
        for d in DTYPES
        for w in ([5000], [2500, 2500], [1, 2047, 2049, 903], [4998, 1, 1])
    ]
    + [("triton", torch.float32, w) for w in ([WIDE], [127, WIDE - 128, 1])],
    ids=str,
)
def test_sharded_equals_unsharded(backend, dtype, widths):
    names, logits = stacked_rows(sum(widths), dtype)
    assert_sharded(backend, names, logits, widths)


@everywhere
@pytest.mark.parametrize("suppress_token", [0, 3, 2500, 4999])
def test_temperature_and_suppressed_token_of_shards(backend, suppress_token):
    chosen = ("peaked", "nans", "infs", "tie_first_and_last")
    names, logits = some_rows(backend, *stacked_rows(5000, torch.float32), *chosen)
    options = {"temperature": 0.6, "suppress_token": suppress_token}
    assert_sharded(backend, names, logits, [1200, 1300, 2500], **options)


@everywhere
def test_partial_results(backend):
    """Each of a shard's three results, with ids of the whole vocabulary."""
    names, logits = stacked_rows(TILE + 801, torch.float32)
    maximum, sum_exp, token = BACKENDS[backend].top1_partial(logits, 1000, temperature=0.7)
    best = logits.double().amax(dim=-1, keepdim=True)
    expected = ((logits.double() - best) / 0.7).exp().sum(dim=-1)
    expected[names.index("all_minus_inf")] = 0  # no mass
    assert torch.equal(token, float64.top1_confidence(logits)[0] + 1000)
    assert_close(maximum, best.squeeze(-1), 0)
    assert_close(sum_exp, expected, RTOL[backend])


@everywhere
def test_maxima_that_round_to_one_quotient(backend):
    """Divided by 3 the two best logits are equal in float32; the larger one wins all the same."""
    low, high = 1.5 + 2**-23, 1.5 + 2**-22
    assert torch.tensor(low) / 3 == torch.tensor(high) / 3
    assert_sharded(backend, ["row"], torch.tensor([[0.0, low, 0.0, high]]), [2, 2], temperature=3.0)


@everywhere
def test_empty_shard_is_exact(backend):
    """Padded columns past the vocabulary, all -inf, have no mass and cannot win."""
    logits = torch.randn(6, 40)
    padded = torch.cat([logits, torch.full((6, 24), -torch.inf)], dim=1)
    maximum, sum_exp, token = BACKENDS[backend].top1_partial(padded[:, 40:], 40)
    assert (maximum == -torch.inf).all()
    assert (sum_exp == 0).all()
    assert (token == 40).all()
    assert_sharded(backend, "abcdef", padded, [40, 24])


@everywhere
def test_ids_beyond_float32(backend):
    """Ids near 2^40 survive: they travel as integers."""
    functions, start = BACKENDS[backend], 2**40 + 1
    *_, token = functions.top1_partial(torch.tensor([[0.0, 1.0]]), start)
    assert token.item() == start + 1
    merged, _ = functions.top1_merge(torch.ones(1, 1), torch.ones(1, 1), token.unsqueeze(0))
    assert merged.item() == start + 1


@compiled
def test_shapes_of_shards(backend):
    functions = BACKENDS[backend]
    partial = functions.top1_partial(torch.randn(2, 3, 7), 0)
    assert all(t.shape == (2, 3) for t in partial)
    assert functions.top1_partial(torch.randn(0, 7), 0)[0].shape == (0,)
    token, confidence = functions.top1_merge(*(torch.stack([t, t]) for t in partial))
    assert token.shape == confidence.shape == (2, 3)
    transposed = (t.expand(2, 2, 3).transpose(1, 2) for t in partial)
    assert functions.top1_merge(*transposed)[0].shape == (3, 2)
    empty = torch.ones(3, 0)
    assert functions.top1_merge(empty, empty, empty.long())[0].shape == (0,)


F32, I64 = torch.ones(2, 3), torch.ones(2, 3).long()


@pytest.mark.parametrize(
    ("op", "arguments", "options", "message"),
    [
        ("top1_confidence", (F32[0, 0],), {}, r"logits must be \[..., V\], got a 0-D tensor"),
        ("top1_confidence", (F32[:, :0],), {}, r"logits must be .* V >= 1, got \[2, 0\]"),
        ("top1_confidence", (F32.double(),), {}, "logits must be float32.*float16, got float64"),
        ("top1_confidence", (I64,), {}, "logits must be float32, bfloat16 or float16, got int64"),
        ("top1_confidence", (F32,), {"temperature": 0.0}, "temperature must be .* 1e-30 .*, got 0"),
        ("top1_confidence", (F32,), {"temperature": -1.0}, "temperature must be .* 1e-30.*got -1"),
        ("top1_confidence", (F32,), {"temperature": float("nan")}, "temperature must .* got nan"),
        ("top1_confidence", (F32,), {"suppress_token": 3}, "suppress_token must .* below 3, got 3"),
        ("top1_confidence", (F32,), {"suppress_token": -2}, "suppress_token must be -1 .*, got -2"),
        *(
            ("topk_confidence", (torch.ones(2, 20), k), {}, rf"k must be in 1\.\.8 .*, got {k}")
            for k in (0, 9, -1)
        ),
        ("topk_confidence", (F32, 4), {}, r"k must be in 1\.\.3 .*, got 4"),
        ("topk_confidence", (F32.bool(), 1), {}, "logits must be float32.* got bool"),
        ("topk_confidence", (F32, 1), {"temperature": 0}, "temperature must be"),
        ("top1_partial", (F32, -1), {}, "vocab_start must be .* -1"),
        ("top1_partial", (I64, 0), {}, "logits_shard must be float32.*int64"),
        ("top1_partial", (F32, 0), {"suppress_token": -2}, r"suppress_token must be -1 \(none\)"),
        ("top1_partial", (F32, 0), {"temperature": 0}, "temperature must be"),
        ("top1_merge", (F32, F32, F32), {}, "token must be int64, got float32"),
        ("top1_merge", (F32, F32, I64), {"temperature": 0}, "temperature must be at least 1e-30"),
        ("top1_merge", (F32.half(), F32, I64), {}, "maximum must be float32"),
        ("top1_merge", (F32, F32[:, :2], I64), {}, r"sum_exp must have shape"),
        ("top1_merge", (F32[:0], F32[:0], I64[:0]), {}, r"maximum must be \[S, "),
    ],
)
def test_bad_input(op, arguments, options, message):
    with pytest.raises(RuntimeError, match=f"^{op}: {message}"):
        getattr(dmax_kernels, op)(*arguments, **options)
