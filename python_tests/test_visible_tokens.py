"""Which tokens count: suppress_tokens, allowed and vocab_limit of the ops that take a row's top-1.

Each op on logits with a mask gives what it gives on the logits with -inf where the mask has no bit.
"""

import itertools

import pytest
import simt_ops
import torch
from cases import DTYPES, stacked_rows, strided_copies
from edit_cases import EDIT_OPTIONS, copy_of, edit_case
from fuzzing import TRITON
from masks import grammar_mask, random_mask
from simt_ops import CHOSEN, H200, H200_CLUSTERS, ONE_MULTIPROCESSOR
from test_simt_embeddings import MASK as SPD_MASK
from test_simt_embeddings import spd_case
from tolerances import CONFIDENCE_RTOL, assert_close
from triton_device import DEVICE

import dmax_kernels
from dmax_kernels import reference
from dmax_kernels.vocabulary import allowed_tokens, shard_mask

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's inf - inf

INF = float("inf")


def ids_of(logits, num=5):
    """Some ids per row; those at the peaks, ties and NaN of most edge cases among them."""
    vocab, generator = logits.shape[-1], torch.manual_seed(2)
    ids = torch.randint(0, min(vocab, 290), (*logits.shape[:-1], num), generator=generator)
    ids[..., 0], ids[..., 1] = 3 % vocab, 6 % vocab
    return ids.to(logits.device)


def results_of_logprobs(ops, x, suppress_token=-1, **options):
    """The op has no suppress_token."""
    if suppress_token >= 0:
        options["suppress_tokens"] = (suppress_token,)
    return ops.token_logprobs(x, ids_of(x), top_n=min(6, x.shape[-1]), **options)


def results_of_spd(ops, logits, **options):
    """The state after two steps; every row of the logits is a block of one position."""
    logits = logits.unsqueeze(1)
    if (allowed := options.get("allowed")) is not None and allowed.numel() > allowed.shape[-1]:
        options["allowed"] = allowed.unsqueeze(1)
    rows = len(logits)
    embedding = torch.randn(300_000, 8, generator=torch.manual_seed(3))[: logits.shape[-1]]
    embedding = embedding.to(logits.device)
    state = {
        "editable": torch.ones(rows, 1, dtype=torch.bool),
        "masked": torch.ones(rows, 1, dtype=torch.bool),
        "token": torch.full((rows, 1), 0),
        "confidence": torch.zeros(rows, 1),
        "converged": torch.arange(rows) == 2,
        "step": torch.zeros(rows, dtype=torch.int32),
        "inputs_embeds": torch.zeros(rows, 1, 8),
    }
    state = {name: tensor.to(logits.device) for name, tensor in state.items()}
    options = {"mask_token_id": 0, "tau_dec": 0.5, "tau_acc": 0.9, **options}
    for _ in range(2):
        ops.spd_step_(logits, embedding, **state, **options)
    return tuple(state.values())


def results_of_edit(ops, logits, **options):
    """The state after a step; every row of the logits is a block of one position."""
    if (allowed := options.get("allowed")) is not None and allowed.numel() > allowed.shape[-1]:
        options["allowed"] = allowed.unsqueeze(1)
    rows = len(logits)
    state = {
        "editable": torch.ones(rows, 1, dtype=torch.bool),
        "token": torch.full((rows, 1), 0),
        "prediction": torch.full((rows, 1), -7),
        "confidence": torch.full((rows, 1), -7.0),
        "post_edit_steps": torch.zeros(rows, dtype=torch.int32),
        "done": torch.arange(rows) == 2,
    }
    state = {name: tensor.to(logits.device) for name, tensor in state.items()}
    options = {"mask_token_id": 0, "threshold": 0.5, **options}
    ops.edit_step_(logits.unsqueeze(1), **state, **options)
    return tuple(state.values())


OPS = {
    "top1_confidence": lambda ops, x, **options: ops.top1_confidence(x, **options),
    "topk_confidence": lambda ops, x, **options: ops.topk_confidence(
        x, min(5, x.shape[-1]), **options
    ),
    "row_statistics": lambda ops, x, **options: ops.row_statistics(x, **options),
    "token_logprobs": results_of_logprobs,
    "top1_partial": lambda ops, x, **options: ops.top1_partial(x, 100, **options),
    "spd_step_": results_of_spd,
    "spd_step_top3": lambda ops, x, **options: results_of_spd(ops, x, top_k=3, **options),
    "edit_step_": results_of_edit,
}
every_op = pytest.mark.parametrize("op", OPS)


def assert_same(actual, expected, exact=True):
    for mine, theirs in zip(actual, expected, strict=True):
        if theirs.dtype.is_floating_point and not exact:
            assert_close(mine.double(), theirs.double(), 2 * CONFIDENCE_RTOL, 2e-6)
        else:
            assert torch.equal(mine.nan_to_num(2.0), theirs.nan_to_num(2.0))


def masked(logits, bits):
    return logits.masked_fill(~bits, -INF)


# ---- The definition


@every_op
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [7, 2049, 9000])
def test_cpu_masks(op, vocab_size, dtype):
    """Bitwise in float32. In the 16-bit types a tile that the mask cuts is added up as float32."""
    _, logits = stacked_rows(vocab_size, dtype)
    for make in (random_mask, grammar_mask):
        for rows in (len(logits), 1):
            allowed, bits = make(rows, vocab_size)
            if rows > 1:
                allowed[5], bits[5] = 0, False  # nothing allowed: as all -inf
            actual = OPS[op](dmax_kernels, logits, allowed=allowed)
            expected = OPS[op](dmax_kernels, masked(logits, bits))
            assert_same(actual, expected, exact=dtype == torch.float32)


@pytest.mark.parametrize("op", [op for op in OPS if op != "top1_partial"])
def test_reference_masks(op):
    """The CPU against the reference, which has the mask from Python's own definition."""
    logits = 3 * torch.randn(6, 300, generator=torch.manual_seed(4))
    allowed, bits = random_mask(6, 300)
    by_hand = [[(word >> bit) & 1 for word in row for bit in range(32)] for row in allowed.tolist()]
    assert torch.equal(torch.tensor(by_hand)[:, :300].bool(), bits)
    options = {"allowed": allowed, "suppress_tokens": (3, 289), "vocab_limit": 290}
    bits[:, [3, 289]] = False
    expected = OPS[op](reference, masked(logits, bits)[:, :290])
    for ops in (reference, dmax_kernels):
        assert_same(OPS[op](ops, logits, **options), expected, exact=False)


@every_op
@pytest.mark.parametrize("rows", [1, 3])
def test_cpu_rows_shared_by_threads(op, rows):
    """Few long rows, whose tiles all threads share."""
    logits = 3 * torch.randn(rows, 300_000, generator=torch.manual_seed(5))
    allowed, bits = grammar_mask(rows, 300_000)
    actual = OPS[op](dmax_kernels, logits, allowed=allowed)
    assert_same(actual, OPS[op](dmax_kernels, masked(logits, bits)))


@every_op
def test_cpu_strides_and_leading_dimensions(op):
    _, logits = stacked_rows(2049, torch.float32)
    logits = logits[:6]
    allowed, _ = random_mask(6, 2049)
    expected = OPS[op](dmax_kernels, logits, allowed=allowed)
    for copy in strided_copies(logits).values():
        assert_same(OPS[op](dmax_kernels, copy, allowed=allowed), expected)
    wide = torch.zeros(6, 2 * allowed.shape[-1], dtype=torch.int32)[:, ::2].copy_(allowed)
    assert_same(OPS[op](dmax_kernels, logits, allowed=wide), expected)


def test_a_mask_may_have_the_rows_leading_shape():
    logits = torch.randn(2, 3, 100, generator=torch.manual_seed(6))
    allowed, bits = random_mask(6, 100)
    token, _ = dmax_kernels.top1_confidence(logits, allowed=allowed.view(2, 3, -1))
    assert torch.equal(token, masked(logits, bits.view(2, 3, -1)).argmax(dim=-1))
    for one in (allowed[0], allowed[:1], allowed[0].view(1, 1, -1)):
        token, _ = dmax_kernels.top1_confidence(logits, allowed=one)
        assert torch.equal(token, masked(logits, bits[0]).argmax(dim=-1))


# ---- suppress_tokens and vocab_limit


@pytest.mark.parametrize("ops", [dmax_kernels, reference], ids=["cpu", "reference"])
@pytest.mark.parametrize("op", [op for op in OPS if op != "top1_partial"])
def test_suppressed_tokens_and_padded_heads(ops, op):
    logits = 3 * torch.randn(5, 330, generator=torch.manual_seed(7))
    for suppressed in [(), (7,), (7, 8, 31, 32, 299)]:
        without = logits.index_fill(-1, torch.tensor(suppressed, dtype=torch.long), -INF)
        actual = OPS[op](ops, logits, suppress_tokens=suppressed, vocab_limit=300)
        assert_same(actual, OPS[op](ops, without[:, :300].contiguous()), exact=False)
    if op == "token_logprobs":
        return
    both = OPS[op](ops, logits, suppress_token=9, suppress_tokens=(7,))
    assert_same(both, OPS[op](ops, logits, suppress_tokens=(7, 9)))


def test_nothing_allowed():
    logits = torch.randn(2, 70)
    nothing = torch.tensor([0, 0, -64]).int()  # bits beyond V
    for ops in (dmax_kernels, reference, simt_ops):
        token, confidence = ops.top1_confidence(logits, allowed=nothing)
        assert token.tolist() == [0, 0]
        assert confidence.isnan().all()
        statistics = ops.row_statistics(logits, allowed=nothing)
        assert statistics.token.tolist() == [0, 0]
        assert statistics.logsumexp.tolist() == [-INF, -INF]
        assert statistics.entropy.isnan().all()


# ---- Log-probabilities


def test_hidden_ids_have_no_probability_and_no_gradient():
    logits = torch.randn(4, 90, generator=torch.manual_seed(8), dtype=torch.float64)
    allowed, bits = random_mask(4, 90)
    ids = torch.stack([row.nonzero()[3] for row in bits]).squeeze(-1)
    ids[2] = (~bits[2]).nonzero()[1]  # a hidden one
    x = logits.float().requires_grad_()
    actual = dmax_kernels.token_logprobs(x, ids, temperature=0.7, allowed=allowed)
    assert actual.logprob[2] == -INF
    assert actual.rank[2] == int(bits[2].sum()) + 1  # after the visible ones and one hidden
    actual.logprob[[0, 1, 3]].sum().backward()
    y = logits.clone().requires_grad_()
    expected = torch.log_softmax(masked(y, bits) / 0.7, dim=-1).gather(-1, ids.unsqueeze(-1))
    expected[[0, 1, 3]].sum().backward()
    assert_close(x.grad, y.grad.float(), 1e-5, 1e-7)
    assert (x.grad[~bits] == 0).all()


# ---- Shards


@pytest.mark.parametrize("cuts", [(64, 160), (37, 101), (1, 2)])
def test_masks_of_shards(cuts):
    logits = 3 * torch.randn(7, 333, generator=torch.manual_seed(9))
    allowed, _ = random_mask(7, 333)
    suppressed = {"suppress_tokens": (5, 150, 332)}
    expected = dmax_kernels.top1_confidence(logits, allowed=allowed, **suppressed)
    parts = [
        dmax_kernels.top1_partial(
            logits[:, a:b], a, allowed=shard_mask(allowed, a, b - a), **suppressed
        )
        for a, b in itertools.pairwise((0, *cuts, 333))
    ]
    merged = dmax_kernels.top1_merge(*map(torch.stack, zip(*parts, strict=True)))
    assert torch.equal(merged[0], expected[0])
    assert_close(merged[1], expected[1], CONFIDENCE_RTOL)


def test_the_mask_of_a_shard():
    allowed, bits = random_mask(3, 300)
    for start in (0, 1, 31, 32, 63, 200):
        for width in (1, 31, 32, 33, 100):
            tokens = allowed_tokens(shard_mask(allowed, start, width), width)
            assert torch.equal(tokens.view(3, width), bits[:, start : start + width])
    # Past the mask's last word nothing is allowed
    everything = torch.full((1, 2), -1, dtype=torch.int32)
    tokens = allowed_tokens(shard_mask(everything, 40, 100), 100)
    assert tokens.tolist() == [True] * 24 + [False] * 76


# ---- The CUDA kernels


def simt_rows(num_rows, vocab_size, dtype):
    generator = torch.manual_seed(vocab_size)
    return (3 * torch.randn(num_rows, vocab_size, generator=generator)).to(dtype)


# Bitwise the kernels' results on the masked logits, in every edge case
@every_op
@pytest.mark.parametrize(
    ("dtype", "vocab_size"),
    [(torch.float32, 129), (torch.float16, 2049), (torch.bfloat16, 4099)],
    ids=str,
)
def test_cuda_masks(op, vocab_size, dtype):
    _, logits = stacked_rows(vocab_size, dtype)
    if op.startswith(("spd", "edit")):
        logits = logits[::3].contiguous()
    for rows in (len(logits), 1):
        allowed, bits = random_mask(rows, vocab_size)
        if rows > 1:
            allowed[3], bits[3] = 0, False
        actual = OPS[op](simt_ops, logits, allowed=allowed, suppress_token=70)
        assert_same(actual, OPS[op](simt_ops, masked(logits, bits), suppress_token=70))


# Rows that several blocks share, tiles that are allowed as a whole or not at all; a masked launch
# is never a cluster
@every_op
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_cuda_masks_of_split_rows(op, dtype):
    vocab = 9 * 2048 + 3
    logits = simt_rows(4, vocab, dtype)
    logits[:, 17_000:17_003] = 30.0
    allowed, bits = grammar_mask(4, vocab)
    expected = OPS[op](simt_ops, masked(logits, bits))
    for gpu, split in ((H200, True), (H200_CLUSTERS, True), (ONE_MULTIPROCESSOR, False)):
        actual = OPS[op](simt_ops, logits, allowed=allowed, gpu=gpu)
        assert CHOSEN[-1].cluster == 1
        # Of float32 rows, which have 19 tiles, two blocks may even out the last wave
        assert dtype == torch.float32 or (CHOSEN[-1].splits > 1) == split
        assert_same(actual, expected)


@pytest.mark.parametrize("op", ["top1_confidence", "row_statistics", "token_logprobs"])
def test_cuda_masks_of_strided_rows(op):
    logits = simt_rows(3, 2100, torch.bfloat16)
    allowed, _ = random_mask(3, 2100)
    expected = OPS[op](simt_ops, logits, allowed=allowed)
    for copy in strided_copies(logits).values():
        assert_same(OPS[op](simt_ops, copy, allowed=allowed), expected)


# Vectors of 16 bytes without an allowed id are not read
@pytest.mark.parametrize("op", ["top1_confidence", "row_statistics"])
def test_cuda_reads_only_what_is_allowed(op):
    logits = simt_rows(2, 8 * 2048, torch.bfloat16)
    allowed = torch.zeros(1, 512, dtype=torch.int32)
    allowed[0, [7, 300]] = 1 << 5
    simt_ops.bytes_read()
    token = OPS[op](simt_ops, logits, allowed=allowed)[0]
    assert set(token.tolist()) <= {7 * 32 + 5, 300 * 32 + 5}
    assert simt_ops.bytes_read() == 2 * 2 * 16
    everything = torch.full((1, 512), -1, dtype=torch.int32)
    OPS[op](simt_ops, logits, allowed=everything)
    assert simt_ops.bytes_read() == logits.nbytes


# Whole blocks with several positions, of which a row has its own masks
@pytest.mark.parametrize("gpu", [H200, ONE_MULTIPROCESSOR])
def test_cuda_spd_step_masks(gpu):
    logits, embedding, state = spd_case(3, 5)
    options = {"mask_token_id": SPD_MASK, "tau_dec": 0.5, "tau_acc": 0.9}
    allowed, bits = random_mask(15, logits.shape[-1])
    allowed, bits = allowed.view(3, 5, -1), bits.view(3, 5, -1)
    actual, expected = copy_of(state), copy_of(state)
    for _ in range(2):
        simt_ops.spd_step_(logits, embedding, **actual, **options, allowed=allowed, gpu=gpu)
        simt_ops.spd_step_(masked(logits, bits), embedding, **expected, **options, gpu=gpu)
        for name in state:
            assert torch.equal(actual[name], expected[name]), name


@pytest.mark.parametrize("rule", ["threshold", "joint_threshold"])
def test_cuda_edit_step_masks(rule):
    logits, state = edit_case(3, 6, seed=3)
    allowed, bits = random_mask(18, logits.shape[-1])
    allowed, bits = allowed.view(3, 6, -1), bits.view(3, 6, -1)
    actual, expected = copy_of(state), copy_of(state)
    for _ in range(2):
        simt_ops.edit_step_(logits, **actual, **EDIT_OPTIONS, rule=rule, allowed=allowed)
        reference.edit_step_(logits, **expected, **EDIT_OPTIONS, rule=rule, allowed=allowed)
        for name in ("token", "prediction", "post_edit_steps", "done"):
            assert torch.equal(actual[name], expected[name]), name


# ---- Triton


# The kernels' results on the masked logits, under the interpreter bitwise; one tile, and several
# with a cut one
@every_op
@pytest.mark.parametrize(
    ("dtype", "vocab_size"), [(torch.float32, 129), (torch.bfloat16, 8999)], ids=str
)
def test_triton_masks(op, vocab_size, dtype):
    _, logits = stacked_rows(vocab_size, dtype)
    logits = logits[::4].contiguous().to(DEVICE)
    for rows in (len(logits), 1):
        allowed, bits = (each.to(DEVICE) for each in grammar_mask(rows, vocab_size))
        if rows > 1:
            allowed[3], bits[3] = 0, False
        actual = OPS[op](TRITON, logits, allowed=allowed)
        expected = OPS[op](TRITON, masked(logits, bits))
        assert_same(actual, expected, exact=DEVICE.type == "cpu")


# ---- On a GPU


@pytest.mark.gpu
@every_op
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [129, 4099, 157183, 157184])
def test_gpu_masks(op, vocab_size, dtype):
    """Bitwise the results on the masked logits, of the kernels that the dispatcher has."""
    _, logits = stacked_rows(vocab_size, dtype)
    for make in (random_mask, grammar_mask):
        for rows in (len(logits), 1):
            allowed, bits = make(rows, vocab_size)
            if rows > 1:
                allowed[3], bits[3] = 0, False
            x = logits.to("cuda")
            actual = OPS[op](dmax_kernels, x, allowed=allowed.to("cuda"))
            assert_same(actual, OPS[op](dmax_kernels, masked(x, bits.to("cuda"))))


# ---- Errors


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"allowed": torch.ones(2, 2).int()}, RuntimeError, r"allowed must have shape \[2, 1\]"),
        ({"allowed": torch.ones(3, 1).int()}, RuntimeError, r"allowed must have shape \[2, 1\]"),
        ({"allowed": torch.ones(2, 1).long()}, RuntimeError, "allowed must be int32, got int64"),
        ({"suppress_tokens": (1, 20)}, ValueError, r"suppress_tokens must be .* \[0, 20\), got 20"),
        ({"suppress_tokens": (-1, 2)}, ValueError, r"suppress_tokens must be .*, got -1"),
        ({"vocab_limit": 21}, ValueError, r"vocab_limit must be in 1\.\.V = 20, got 21"),
        ({"vocab_limit": 0}, ValueError, r"vocab_limit must be in 1\.\.V = 20, got 0"),
    ],
    ids=str,
)
@pytest.mark.parametrize("op", [op for op in OPS if op != "top1_partial"])
def test_errors(op, options, error, message):
    if op.startswith(("spd", "edit")):
        message = message.replace(r"\[2, 1\]", r"\[2, 1, 1\]")
    name = op.removesuffix("top3")
    with pytest.raises(error, match=f"^{name}: {message}"):
        OPS[op](dmax_kernels, torch.randn(2, 20), **options)


def test_errors_of_shards():
    logits = torch.randn(2, 20)
    with pytest.raises(RuntimeError, match=r"^top1_partial: allowed must have shape \[2, 1\]"):
        dmax_kernels.top1_partial(logits, 40, allowed=torch.ones(2, 2).int())
    with pytest.raises(ValueError, match="^top1_partial: suppress_tokens must be .*, got -3"):
        dmax_kernels.top1_partial(logits, 40, suppress_tokens=(50, -3))
