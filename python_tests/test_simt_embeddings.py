"""The CUDA kernels of promotion, hybrid embeddings and the whole SPD step, run on the CPU."""

import pytest
import simt_build
import simt_ops
import torch
from cases import DTYPES
from simt_ops import CHOSEN, H200, H200_CLUSTERS, ONE_MULTIPROCESSOR
from tolerances import ROUNDING, assert_close

from dmax_kernels import reference
from dmax_kernels.ops.spd_step import SEMANTICS

NAN = float("nan")


# Blocks around the 32 lanes of a warp, and longer than a block of threads
@pytest.mark.parametrize("block", [1, 7, 31, 32, 33, 64, 300])
@pytest.mark.parametrize("inclusive", [False, True])
def test_prefix_promote(block, inclusive):
    generator = torch.manual_seed(block)
    confidence = torch.rand(40, block, generator=generator)
    confidence[:, ::3] = 0.25  # equal to the threshold
    confidence[:20] = confidence[:20] / 2 + 0.5  # long prefixes
    confidence[5, block // 2] = NAN
    masked = torch.rand(40, block, generator=generator) < 0.6
    masked[0], masked[1] = True, False
    actual = simt_ops.prefix_promote(confidence, masked, 0.25, inclusive=inclusive)
    expected = reference.prefix_promote(confidence, masked, 0.25, inclusive=inclusive)
    assert torch.equal(actual, expected)


def mix_case(k, positions=21, vocab=50, dtype=torch.float32, dim=40):
    generator = torch.manual_seed(7 * k + dim)
    embedding = torch.randn(vocab, dim, generator=generator).to(dtype)
    embedding[4] = 0  # no norm
    embedding[5] = -embedding[49]  # opposite to the mask: the mix can vanish
    token = torch.randint(0, vocab, (positions, k), generator=generator)
    confidence = torch.rand(positions, k, generator=generator) / k
    token[:4, 0] = torch.tensor([4, 5, 49, 7])
    confidence[1] = 0.0
    confidence[1, 0] = 0.5
    confidence[4], confidence[5] = 0.0, 0.0
    confidence[5, 0] = 1.0
    confidence[6, 0] = 1.25  # by rounding, and more: no residual
    masked = torch.arange(positions) % 5 == 4
    masked[4] = False
    if k == 1:
        token, confidence = token.squeeze(-1), confidence.squeeze(-1)
    return embedding, token, confidence, masked


def hybrid_in_float64(table, token, p, masked):
    """Eqs. 8-10 in float64, differentiable; [r > 0] decides at r = 0."""
    if token.dim() == masked.dim():
        token, p = token.unsqueeze(-1), p.unsqueeze(-1)
    residual = 1 - p.sum(dim=-1)
    residual = torch.where(residual > 0, residual, 0.0)
    e, m = table[token], table[49]
    mix = (p.unsqueeze(-1) * e).sum(dim=-2) + residual.unsqueeze(-1) * m
    target = (p * e.norm(dim=-1)).sum(dim=-1) + residual * m.norm()
    norm = mix.norm(dim=-1)
    out = mix * torch.where(norm == 0, 0.0, target / norm).unsqueeze(-1)
    return torch.where(masked.unsqueeze(-1), m, out)


# 40: vectors and a part of a block's stride; 37: no alignment; 1; 2,048: a vector per thread in
# 16 bits and two in 32; 4,200: more vectors than stay in registers
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 2, 8])
@pytest.mark.parametrize("dim", [1, 37, 40, 2048, 4200])
def test_hybrid_embedding(dtype, k, dim):
    embedding, token, confidence, masked = mix_case(k, dtype=dtype, dim=dim)
    actual = simt_ops.hybrid_embedding(embedding, token, confidence, masked, 49)
    expected = hybrid_in_float64(embedding.double(), token, confidence.double(), masked)
    keep = torch.ones(len(masked), dtype=torch.bool)
    if k == 1:
        keep[1] = False  # the mix cancels: what is left of it is rounding, rescaled
        assert actual[1].isfinite().all()
        assert torch.equal(actual[5], embedding[token[5]])  # p = 1
    assert_close(actual[keep], expected[keep], ROUNDING[dtype], 3e-6)
    assert torch.equal(actual[masked], embedding[49].expand(int(masked.sum()), dim))


def test_hybrid_embedding_of_broken_input():
    """A NaN confidence or an id outside the table makes a row of NaN, and reads nothing."""
    embedding, token, confidence, masked = mix_case(2)
    confidence[2, 1] = NAN
    token[3, 0] = 50
    token[7, 1] = -1
    token[9] = 1 << 40  # masked: not looked at
    out = simt_ops.hybrid_embedding(embedding, token, confidence, masked, 49)
    broken = out.isnan().all(dim=1)
    assert broken.nonzero().squeeze(-1).tolist() == [2, 3, 7]


def test_hybrid_embedding_token_types():
    embedding, token, confidence, masked = mix_case(1)
    narrow = simt_ops.hybrid_embedding(embedding, token.int(), confidence, masked, 49)
    wide = simt_ops.hybrid_embedding(embedding, token, confidence, masked, 49)
    assert torch.equal(narrow, wide)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("dim", [37, 40, 264])
def test_hybrid_embedding_backward(dtype, k, dim):
    # 150 positions: three slices of the mask's sum; few ids, so most tokens are named several times
    embedding, token, confidence, masked = mix_case(
        k, positions=150, vocab=50, dtype=dtype, dim=dim
    )
    embedding[5] = embedding[6]  # no gradient to compare where the mix vanishes
    grad = torch.randn(150, dim, generator=torch.manual_seed(3)).to(dtype)
    actual = simt_ops.hybrid_embedding_backward(grad, embedding, token, confidence, masked, 49)
    leaves = [embedding.double().requires_grad_(), confidence.double().requires_grad_()]
    out = hybrid_in_float64(leaves[0], token, leaves[1], masked)
    expected = torch.autograd.grad(out, leaves, grad.double())
    keep = ~(token == 4).reshape(150, -1).any(dim=1)  # |e| = 0: d p differs by convention
    scale = expected[0].abs().max()
    assert_close(actual[0], expected[0], ROUNDING[dtype], 1e-5 * float(scale))
    assert_close(actual[1][keep], expected[1][keep], 2e-5, 2e-4)
    again = simt_ops.hybrid_embedding_backward(grad, embedding, token, confidence, masked, 49)
    assert torch.equal(actual[0], again[0])


# ---- The whole step ----

MASK = 39
WRITTEN = ("masked", "token", "confidence", "converged", "step", "inputs_embeds")


def spd_case(batch, block, vocab=40, dim=24, dtype=torch.float32, embedding_dtype=None, seed=0):
    """A state in the middle of a block: prompts, masks, tokens already decoded."""
    generator = torch.manual_seed(seed)
    embedding = torch.randn(vocab, dim, generator=generator).to(embedding_dtype or dtype)
    editable = torch.rand(batch, block, generator=generator) < 0.85
    masked = editable & (torch.rand(batch, block, generator=generator) < 0.6)
    token = torch.randint(0, vocab - 1, (batch, block), generator=generator)
    state = {
        "editable": editable,
        "masked": masked,
        "token": torch.where(masked, MASK, token),
        "confidence": torch.rand(batch, block, generator=generator),
        "converged": torch.zeros(batch, dtype=torch.bool),
        "step": torch.arange(batch, dtype=torch.int32) % 3,
        "inputs_embeds": torch.randn(batch, block, dim, generator=generator).to(embedding.dtype),
    }
    logits = 2 * torch.randn(batch, block, vocab, generator=generator)
    # peaks at the tokens already there (consistency), and at others; some rows sure, some not
    peak = torch.where(
        torch.rand(batch, block, generator=generator) < 0.7, token, (token + 1) % vocab
    )
    height = 2 + 8 * torch.rand(batch, block, generator=generator)
    logits.scatter_(-1, peak.unsqueeze(-1), height.unsqueeze(-1))
    if batch > 2:
        state["converged"][1] = True
        editable[2], masked[2] = False, False  # nothing to decode
    if batch > 4:
        consistent = torch.where(editable[3], token[3], 0)
        masked[3] = False
        state["token"][3] = token[3]
        logits[3].zero_().scatter_(-1, consistent.unsqueeze(-1), 3.0)
        state["step"][3] = 1
        logits[4].zero_().scatter_(-1, peak[4].unsqueeze(-1), 30.0)  # sure everywhere
    return logits.to(dtype), embedding, state


def copy_of(state):
    return {name: tensor.clone() for name, tensor in state.items()}


def assert_step(logits, embedding, state, gpu=H200, **options):
    expected, actual = copy_of(state), copy_of(state)
    options = {"mask_token_id": MASK, "tau_dec": 0.5, "tau_acc": 0.9, **options}
    reference.spd_step_(logits, embedding, **expected, **options)
    before = simt_build.load().take_launch_count()
    simt_ops.spd_step_(logits, embedding, **actual, **options, gpu=gpu)
    assert simt_build.load().take_launch_count() == 1, before
    for name in ("masked", "token", "converged", "step"):
        assert torch.equal(actual[name], expected[name]), name
    assert_close(actual["confidence"], expected["confidence"], 1e-5)
    # Where two of the eight embeddings nearly cancel, float32 sums in a different order differ more
    assert_close(actual["inputs_embeds"], expected["inputs_embeds"],
                 ROUNDING[embedding.dtype], 1e-5)  # fmt: skip
    return actual


@pytest.mark.parametrize("semantics", SEMANTICS)
@pytest.mark.parametrize("top_k", [1, 4])
@pytest.mark.parametrize("block", [1, 31, 32, 33, 64])
def test_spd_step(semantics, top_k, block):
    logits, embedding, state = spd_case(7, block, seed=block)
    after = assert_step(logits, embedding, state, semantics=semantics, top_k=top_k)
    assert after["converged"].sum() >= 3
    assert not after["converged"].all()


# More positions than the block of phase 3 has threads
def test_spd_step_long_block():
    logits, embedding, state = spd_case(2, 270)
    for semantics in SEMANTICS:
        assert_step(logits, embedding, state, semantics=semantics)


# Element types of logits and embeddings in all combinations, and dimensions without 16-byte rows
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("embedding_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [24, 13])
def test_spd_step_dtypes(dtype, embedding_dtype, dim):
    logits, embedding, state = spd_case(
        5, 6, dtype=dtype, embedding_dtype=embedding_dtype, dim=dim, seed=3
    )
    for top_k in (1, 2):
        assert_step(logits, embedding, state, top_k=top_k)


# Rows split among blocks: three phases, each entered by the last block of the one before, or the
# second by a cluster's first block
@pytest.mark.parametrize("semantics", SEMANTICS)
@pytest.mark.parametrize(
    ("top_k", "gpu"), [(1, H200), (3, H200), (1, H200_CLUSTERS)], ids=["1", "3", "1-clusters"]
)
@pytest.mark.parametrize(
    ("name", "seed", "resident"),
    [("in order", 0, 1), ("reversed", 0, 4), ("random", 0, 4), ("random", 1, 1), ("random", 2, 3)],
)
def test_spd_step_split_rows_in_any_order(semantics, top_k, gpu, name, seed, resident):
    logits, embedding, state = spd_case(3, 4, vocab=16500, dtype=torch.bfloat16, seed=9)
    with simt_ops.order(name, seed, resident):
        assert_step(logits, embedding, state, semantics=semantics, top_k=top_k, gpu=gpu)
    assert CHOSEN[-1].splits == 2
    assert CHOSEN[-1].cluster == (2 if gpu is H200_CLUSTERS else 1)


# The ways of a row's blocks give the same bits, embeddings included
def test_spd_step_bits_do_not_depend_on_clusters():
    case = {"vocab": 16500, "dtype": torch.bfloat16, "dim": 2048}
    results = []
    for gpu in (H200, H200_CLUSTERS, ONE_MULTIPROCESSOR):
        logits, embedding, state = spd_case(3, 5, **case)
        simt_ops.spd_step_(
            logits, embedding, **state, mask_token_id=MASK, tau_dec=0.5, tau_acc=0.9, gpu=gpu
        )
        results.append(state)
    for name in WRITTEN:
        assert torch.equal(results[1][name], results[0][name]), name
        assert torch.equal(results[2][name], results[0][name]), name


def test_spd_step_without_split():
    logits, embedding, state = spd_case(3, 4, vocab=16500, dtype=torch.bfloat16, seed=9)
    assert_step(logits, embedding, state, gpu=ONE_MULTIPROCESSOR)
    assert CHOSEN[-1].splits == 1


# Many steps on the same buffers, as a captured graph replays them: counters reset, frozen rows stay
@pytest.mark.parametrize("semantics", SEMANTICS)
def test_spd_trajectory(semantics):
    _, embedding, state = spd_case(4, 8, seed=2)
    state["converged"].zero_()
    state["masked"] = state["editable"].clone()
    state["token"] = torch.where(state["editable"], MASK, state["token"])
    state["step"].zero_()
    target = torch.randint(0, 38, (4, 8), generator=torch.manual_seed(1))
    for step in range(8):
        noise = torch.randn(4, 8, 40, generator=torch.manual_seed(step))
        logits = noise * (2.0 / (step + 1))
        logits.scatter_add_(-1, target.unsqueeze(-1), torch.full((4, 8, 1), 2.0 + step))
        state = assert_step(logits, embedding, state, semantics=semantics, tau_dec=0.3)
    assert state["converged"].all()


def test_spd_step_thresholds_per_row():
    logits, embedding, state = spd_case(4, 6, seed=5)
    thresholds = torch.tensor([[0.1, 0.2], [0.5, 0.9], [2.0, 2.0], [-1.0, -1.0]])
    for semantics in SEMANTICS:
        assert_step(logits, embedding, state, thresholds=thresholds, semantics=semantics)


def test_spd_step_nan_is_never_promoted():
    logits, embedding, state = spd_case(1, 6, seed=6)
    state["masked"][:] = state["editable"][:] = True
    logits[0, 2, 7] = NAN
    actual = copy_of(state)
    simt_ops.spd_step_(logits, embedding, **actual, mask_token_id=MASK, tau_dec=-1.0, tau_acc=-1.0)
    assert actual["masked"].tolist() == [[False, False, True, True, True, True]]
    assert actual["token"][0, 2] == 7
    assert not actual["converged"].any()


def test_spd_step_converged_rows_are_not_read():
    logits, embedding, state = spd_case(3, 4, seed=7)
    state["converged"][:] = True
    logits[:] = NAN
    after = assert_step(logits, embedding, state)
    for name in WRITTEN:
        assert torch.equal(after[name], state[name])
