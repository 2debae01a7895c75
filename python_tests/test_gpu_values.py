"""Every op on the GPU against the CPU backend, on the edge cases, and bitwise repeatable.

The CPU backend itself is compared with float64 and the references (test_<op>.py).
"""

import pytest
import torch
from cases import (
    DTYPES,
    LARGE_VOCABS,
    SMALL_VOCABS,
    stacked_rows,
    strided_copies,
)
from edit_cases import EDIT_OPTIONS, edit_case
from test_simt_embeddings import MASK, copy_of, mix_case, spd_case
from tolerances import (
    CONFIDENCE_RTOL,
    LOSS_ATOL,
    LOSS_RTOL,
    ROUNDING,
    assert_close,
    assert_statistics,
)

import dmax_kernels
from dmax_kernels.ops.edit_step import EDIT_RULES
from dmax_kernels.ops.spd_step import SEMANTICS
from dmax_kernels.vocabulary import allowed_tokens

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
LOSS_OPTIONS = (
    {},
    {"label_smoothing": 0.1},
    {"label_smoothing": 0.3, "z_loss": 1e-2, "temperature": 1.7},
    {"temperature": 0.6},
)


def to(device, value):
    if torch.is_tensor(value):
        return value.to(device)
    if isinstance(value, dict):
        return {name: to(device, each) for name, each in value.items()}
    return value


def on_both(op, *arguments, **options):
    """The CPU's and the GPU's results on the CPU; the GPU runs twice and must repeat its bits."""
    function = getattr(dmax_kernels, op)
    expected = function(*arguments, **options)
    moved = [to(DEVICE, each) for each in arguments], {k: to(DEVICE, v) for k, v in options.items()}
    first, again = (function(*moved[0], **moved[1]) for _ in range(2))
    as_tuple = lambda x: (x,) if torch.is_tensor(x) else x  # noqa: E731
    for a, b in zip(as_tuple(first), as_tuple(again), strict=True):
        assert a is None or torch.equal(bits(a), bits(b))
    return expected, to_cpu(first)


def to_cpu(result):
    if torch.is_tensor(result):
        return result.cpu()
    return tuple(None if x is None else x.cpu() for x in result)


def bits(x):
    views = {2: torch.int16, 4: torch.int32}
    return x.view(views[x.element_size()]) if x.is_floating_point() else x


def assert_tokens(actual, expected, rtol=CONFIDENCE_RTOL):
    assert actual[0].tolist() == expected[0].tolist()
    # each side has its own rounding, so twice the tolerance; far below the maximum 1e-9 is
    # negligible
    assert_close(actual[1], expected[1], 2 * rtol, 1e-9)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [*SMALL_VOCABS, *LARGE_VOCABS])
def test_rows(dtype, vocab_size):
    _, logits = stacked_rows(vocab_size, dtype)
    for options in ({}, {"temperature": 0.7, "suppress_token": vocab_size // 2}):
        assert_tokens(*reversed(on_both("top1_confidence", logits, **options)))
        k = min(8, vocab_size)
        assert_tokens(*reversed(on_both("topk_confidence", logits, k, **options)))
        expected, actual = on_both("row_statistics", logits, **options)
        assert_statistics(actual, expected, 2)
        ids = torch.arange(len(logits)) * 7919 % vocab_size
        several = {"temperature": options.get("temperature", 1.0), "top_n": k}
        expected_logprobs, logprobs = on_both("token_logprobs", logits, ids, **several)
        assert logprobs[1].tolist() == expected_logprobs[1].tolist()
        assert logprobs[2].tolist() == expected_logprobs[2].tolist()
        assert_close(logprobs[0], expected_logprobs[0], 2e-6, 2e-6)
        assert_close(logprobs[3], expected_logprobs[3], 2e-6, 2e-6)
        top1 = dmax_kernels.top1_confidence(logits.to(DEVICE), **options)
        assert torch.equal(bits(actual[1]), bits(to_cpu(top1)[1]))
        expected, actual = on_both("top1_partial", logits, 0, **options)
        assert actual[2].tolist() == expected[2].tolist()
        assert_close(actual[0], expected[0], 0)
        assert_close(actual[1], expected[1], 1e-5)


# Few rows (a cluster each, or split among blocks) and many; on a GPU a temperature that is out of
# range is not refused
@pytest.mark.parametrize("num_rows", [3, 32, 2048])
def test_a_temperature_per_row(num_rows):
    generator = torch.Generator(DEVICE).manual_seed(2)
    logits = (3 * torch.randn(num_rows, 40_000, device=DEVICE, generator=generator)).bfloat16()
    temperature = torch.rand(num_rows, device=DEVICE, generator=generator) + 0.2
    temperature[1] = 0
    statistics = dmax_kernels.row_statistics(logits, temperature=temperature)
    assert statistics.token[1] == 0
    assert all(each[1].isnan() for each in statistics[1:])
    for row in {0, 2, num_rows - 1}:
        value = temperature[row].item()
        alone = dmax_kernels.row_statistics(logits[row : row + 1], temperature=value)
        for a, b in zip(alone, statistics, strict=True):
            assert torch.equal(a, b[row : row + 1])


# 32 rows (split among blocks) up to more rows than the GPU holds blocks; each row's bits are those
# that it has alone
@pytest.mark.parametrize("num_rows", [1, 32, 200, 2048])
def test_bits_do_not_depend_on_the_batch(num_rows):
    generator = torch.Generator(DEVICE).manual_seed(1)
    logits = (3 * torch.randn(num_rows, 157184, device=DEVICE, generator=generator)).bfloat16()
    token, confidence = dmax_kernels.top1_confidence(logits)
    loss, _ = dmax_kernels.oput_loss(logits, None, token)
    sampled = dmax_kernels.topk_confidence(logits, 4)
    statistics = dmax_kernels.row_statistics(logits)
    for row in range(0, num_rows, max(1, num_rows // 7)):
        alone = logits[row : row + 1].clone()
        assert torch.equal(dmax_kernels.top1_confidence(alone)[1], confidence[row : row + 1])
        assert torch.equal(dmax_kernels.oput_loss(alone, None, token[row : row + 1])[0],
                           loss[row : row + 1])  # fmt: skip
        assert torch.equal(dmax_kernels.topk_confidence(alone, 4)[1], sampled[1][row : row + 1])
        for a, b in zip(dmax_kernels.row_statistics(alone), statistics, strict=True):
            assert torch.equal(a, b[row : row + 1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(dtype):
    logits = (3 * torch.randn(5, 3001, generator=torch.manual_seed(2))).to(dtype)
    expected = dmax_kernels.top1_confidence(logits)
    for name, strided in strided_copies(logits.to(DEVICE)).items():
        assert_tokens(to_cpu(dmax_kernels.top1_confidence(strided)), expected)
        assert name
    expanded = logits[:1].to(DEVICE).expand(4, 3001)
    assert_tokens(
        to_cpu(dmax_kernels.top1_confidence(expanded)), [x[:1].expand(4) for x in expected]
    )


@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0, 3)])
def test_no_rows(shape):
    logits = torch.empty(*shape, 100, device=DEVICE)
    token, confidence = dmax_kernels.top1_confidence(logits)
    assert token.shape == confidence.shape == shape
    losses = dmax_kernels.oput_loss(logits, logits, token)
    assert all(loss.shape == shape for loss in losses)


def test_more_than_2_to_31_elements():
    """Rows far apart through strides, and the last of more rows than int32 offsets can reach."""
    row_stride = (1 << 31) + 8
    if torch.cuda.mem_get_info()[0] < 6 * row_stride:
        pytest.skip("needs 13 GB of free GPU memory")
    memory = torch.zeros(2 * row_stride, dtype=torch.bfloat16, device=DEVICE)
    far = memory.as_strided((2, 5000), (row_stride, 1))
    far[1, 4321] = 9.0
    assert dmax_kernels.top1_confidence(far)[0].tolist() == [0, 4321]
    target = torch.tensor([1, 4321], device=DEVICE)
    loss, _ = dmax_kernels.oput_loss(far, None, target)
    assert_close(
        loss.cpu(), far.cpu().double().log_softmax(-1)[[0, 1], [1, 4321]].neg(), 1e-5, 1e-6
    )
    many = memory[: 13_800 * 157184].view(13_800, 157184)
    many[-1].zero_()
    many[-1, 77] = 5.0
    token, _ = dmax_kernels.top1_confidence(many)
    assert int(token[-1]) == 77


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [7, 2049, 157183])
def test_sampling(per_row, dtype, vocab_size):
    _, logits = stacked_rows(vocab_size, dtype)
    pair = torch.tensor([987654321012345, 3])
    seed = torch.stack([pair + r for r in range(len(logits))]) if per_row else pair
    for temperature in (0.0, 0.5, 1.0):
        expected, actual = on_both("sample_tokens", logits, seed, temperature=temperature)
        # logf and log1pf of the two backends may differ by a rounding: a tie within it is possible
        assert (actual[0] != expected[0]).sum() <= 1
        same = actual[0] == expected[0]
        for mine, theirs in zip(actual[1:], expected[1:], strict=True):
            assert_close(mine[same], theirs[same], 2 * CONFIDENCE_RTOL, 1e-9)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options", [{"top_k": 50}, {"top_p": 0.9}, {"min_p": 0.05}, {"top_k": 9000, "top_p": 0.5}]
)
def test_sample_filters(dtype, options):
    _, logits = stacked_rows(157183, dtype)
    seed = torch.tensor([987654321012345, 3])
    expected, actual = on_both("sample_tokens", logits, seed, **options)
    # A sum's rounding may move a cut by one token, and with it a draw
    assert (actual[0] != expected[0]).sum() <= 1
    same = actual[0] == expected[0]
    for mine, theirs in zip(actual[1:], expected[1:], strict=True):
        assert_close(mine[same], theirs[same], 1e-5, 1e-9)


# Whole vectors, and rows that begin between two of them
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [2049, 157184, 157183])
@pytest.mark.parametrize("everything", [False, True])
def test_transform(dtype, vocab, everything):
    generator = torch.manual_seed(vocab)
    logits = (4 * torch.randn(2, 5, vocab, generator=generator)).to(dtype)
    logits[0, 0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    counts = torch.randint(-1, 3, (2, vocab), generator=generator).int()
    words = torch.randint(-(2**31), 2**31, (2, -(-vocab // 32)), generator=generator).int()
    options = {
        "output_counts": counts, "prompt_tokens": words, "presence_penalty": 0.3,
        "frequency_penalty": 0.2, "repetition_penalty": torch.tensor([1.3, 0.7]),
    }  # fmt: skip
    if everything:
        options |= {"softcap": 10.0, "bias": torch.randn(vocab, generator=generator)}
    expected = dmax_kernels.transform_logits_(logits.clone(), **options)
    moved = to(DEVICE, options)
    actual, again = (dmax_kernels.transform_logits_(logits.to(DEVICE), **moved) for _ in range(2))
    assert torch.equal(bits(actual), bits(again))
    if everything:  # the soft caps' roundings may move a result by one unit
        assert_close(actual.cpu(), expected, 2 * ROUNDING[dtype], 1e-5)
    else:
        assert torch.equal(actual.cpu().nan_to_num(77.0), expected.nan_to_num(77.0))
    invalid = torch.tensor([1.3, torch.nan], device=DEVICE)
    moved |= {"repetition_penalty": invalid}
    seen = dmax_kernels.transform_logits_(logits.to(DEVICE), **moved).isnan()[1].cpu()
    occurred = (counts[1] > 0) | allowed_tokens(words[1], vocab)
    assert torch.equal(seen, occurred.expand(5, vocab))


# Starts that are multiples of a CUDA tile, and starts that are not
@pytest.mark.parametrize("width", [1024, 1088])
def test_sample_of_shards(width):
    _, logits = stacked_rows(4096, torch.bfloat16)
    logits, seed = logits.to(DEVICE), torch.tensor([987654321012345, 3], device=DEVICE)
    parts = [
        dmax_kernels.sample_partial(logits[:, a : a + width], seed, a, temperature=0.7)
        for a in range(0, 4096, width)
    ]
    stacked = [torch.stack(each) for each in zip(*parts, strict=True)]
    actual = dmax_kernels.sample_merge(*stacked, temperature=0.7)
    expected = dmax_kernels.sample_tokens(logits, seed, temperature=0.7)
    assert_tokens(to_cpu(actual), to_cpu(expected[:2]))


def test_samples_follow_the_distribution():
    """Chi-square over 12 tokens and 200,000 draws, all of one launch: 11 degrees of freedom."""
    logits = torch.linspace(-2, 2, 12, device=DEVICE)
    seed = torch.tensor([42, 0], device=DEVICE)
    draws = dmax_kernels.sample_tokens(logits.expand(200_000, 12), seed).token
    counts = torch.bincount(draws, minlength=12).double().cpu()
    expected = 200_000 * torch.softmax(logits.cpu().double(), -1)
    assert float(((counts - expected).square() / expected).sum()) < 31.3  # p = 0.001


def test_merge():
    _, logits = stacked_rows(4096, torch.float32)
    parts = [dmax_kernels.top1_partial(logits[:, a : a + 1024], a) for a in range(0, 4096, 1024)]
    expected, actual = on_both(
        "top1_merge", *(torch.stack(each) for each in zip(*parts, strict=True))
    )
    assert_tokens(actual, expected)


@pytest.mark.parametrize("block", [1, 31, 32, 33, 64, 256])
def test_prefix_promote(block):
    confidence = torch.rand(50, block, generator=torch.manual_seed(block))
    confidence[:, ::3] = 0.25
    confidence[7, block // 2] = torch.nan
    masked = torch.rand(50, block, generator=torch.manual_seed(1)) < 0.6
    for inclusive in (False, True):
        expected, actual = on_both("prefix_promote", confidence, masked, 0.25, inclusive=inclusive)
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 3, 8])
@pytest.mark.parametrize("dim", [1, 37, 2048])
def test_hybrid_embedding(dtype, k, dim):
    embedding, token, confidence, masked = mix_case(k, dtype=dtype, dim=dim)
    embedding[5] = embedding[6]  # where the mix cancels, only rounding is left to compare
    expected, actual = on_both("hybrid_embedding", embedding, token, confidence, masked, 49)
    assert_close(actual, expected, 2 * ROUNDING[dtype], 1e-5)
    grads = []
    for device in ("cpu", DEVICE, DEVICE):
        leaves = [to(device, x).clone().requires_grad_() for x in (embedding, confidence)]
        out = dmax_kernels.hybrid_embedding(
            leaves[0], to(device, token), leaves[1], to(device, masked), 49
        )
        weight = torch.randn(out.shape, generator=torch.manual_seed(3)).to(out)
        out.backward(weight)
        grads.append([leaf.grad.cpu() for leaf in leaves])
    scale = float(grads[0][0].abs().max())
    assert_close(grads[1][0], grads[0][0], 2 * ROUNDING[dtype], 2e-5 * scale)
    keep = ~(token == 4).reshape(len(masked), -1).any(dim=1)  # |e| = 0: d p is a convention
    assert_close(grads[1][1][keep], grads[0][1][keep], 1e-4, 1e-3)
    for first, again in zip(grads[1], grads[2], strict=True):
        assert torch.equal(bits(first), bits(again))


@pytest.mark.parametrize("semantics", SEMANTICS)
@pytest.mark.parametrize("top_k", [1, 4])
@pytest.mark.parametrize(("block", "vocab"), [(1, 40), (33, 40), (256, 40), (4, 157184)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_spd_step(semantics, top_k, block, vocab, dtype):
    logits, embedding, state = spd_case(7, block, vocab=vocab, dim=264, dtype=dtype, seed=block)
    options = {"mask_token_id": MASK, "tau_dec": 0.5, "tau_acc": 0.9, "semantics": semantics,
               "top_k": top_k}  # fmt: skip
    expected = copy_of(state)
    dmax_kernels.spd_step_(logits, embedding, **expected, **options)
    for _ in range(2):  # the second time with the counters of the first
        actual = to(DEVICE, copy_of(state))
        dmax_kernels.spd_step_(logits.to(DEVICE), embedding.to(DEVICE), **actual, **options)
        for name in ("masked", "token", "converged", "step"):
            assert torch.equal(actual[name].cpu(), expected[name]), name
        assert_close(actual["confidence"].cpu(), expected["confidence"], 1e-5)
        assert_close(actual["inputs_embeds"].cpu(), expected["inputs_embeds"],
                     2 * ROUNDING[dtype], 2e-5)  # fmt: skip


@pytest.mark.parametrize("rule", EDIT_RULES)
@pytest.mark.parametrize(("block", "vocab"), [(1, 40), (33, 40), (300, 40), (4, 157184)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_edit_step(rule, block, vocab, dtype):
    logits, state = edit_case(7, block, vocab, dtype)
    expected, actual = copy_of(state), to(DEVICE, copy_of(state))
    for _ in range(4):  # from the second on with the counters of the one before
        dmax_kernels.edit_step_(logits, **expected, **EDIT_OPTIONS, rule=rule)
        dmax_kernels.edit_step_(logits.to(DEVICE), **actual, **EDIT_OPTIONS, rule=rule)
        for name in ("token", "prediction", "post_edit_steps", "done"):
            assert torch.equal(actual[name].cpu(), expected[name]), name
        assert_close(actual["confidence"].cpu(), expected["confidence"], 1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [1, 7, 2049, 157183, 157184, 262144])
@pytest.mark.parametrize("options", LOSS_OPTIONS, ids=str)
def test_loss(dtype, vocab_size, options):
    generator = torch.manual_seed(vocab_size)
    logits = [(3 * torch.randn(6, vocab_size, generator=generator)).to(dtype) for _ in range(2)]
    target = torch.randint(0, vocab_size, (6,), generator=generator)
    target[2] = -100
    weight = torch.randn(2, 6, generator=generator)
    results = []
    for device in ("cpu", DEVICE):
        leaves = [x.to(device, copy=True).requires_grad_() for x in logits]
        losses = dmax_kernels.oput_loss(*leaves, target.to(device), **options)
        sum((a * b.to(device)).sum() for a, b in zip(losses, weight, strict=True)).backward()
        written = [x.to(device, copy=True) for x in logits]
        in_place = dmax_kernels.oput_loss_and_grad_(
            *written, target.to(device), weight[0].to(device), weight[1].to(device), **options
        )
        grads = [leaf.grad for leaf in leaves]
        results.append([[x.detach().cpu() for x in each]
                        for each in (losses, in_place, grads, written)])  # fmt: skip
    cpu, gpu = results
    for index in (0, 1):
        for a, b in zip(gpu[index], cpu[index], strict=True):
            assert_close(a, b, 2 * LOSS_RTOL, 4 * LOSS_ATOL)
    for a, b in zip(gpu[0], gpu[1], strict=True):
        assert torch.equal(a, b)  # forward alone and in place: the same statistics
    for index in (2, 3):
        for a, b in zip(gpu[index], cpu[index], strict=True):
            assert_close(a, b, 2 * ROUNDING[dtype], 2e-6)


def test_loss_target_outside_the_vocabulary():
    logits = torch.randn(4, 100, device=DEVICE)
    target = torch.tensor([1, 100, -7, 1 << 40], device=DEVICE)
    loss, _ = dmax_kernels.oput_loss(logits, None, target)
    assert loss.isnan().tolist() == [False, True, True, True]
    dmax_kernels.oput_loss_and_grad_(logits, None, target)
    assert logits.isnan().all(dim=1).tolist() == [False, True, True, True]


def test_messages_are_those_of_the_cpu():
    for arguments, options in (
        ((torch.zeros(2, 3, dtype=torch.float64),), {}),
        ((torch.zeros(2, 3),), {"temperature": -1.0}),
        ((torch.zeros(2, 3),), {"suppress_token": 3}),
    ):
        texts = []
        for device in ("cpu", DEVICE):
            with pytest.raises(RuntimeError) as error:
                torch.ops.dmax.top1_confidence(arguments[0].to(device), **options)
            texts.append(str(error.value).splitlines()[0])
        assert texts[0] == texts[1]
