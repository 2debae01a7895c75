"""The CUDA kernels of the OPUT loss, run on the CPU: forward, backward, and both in place."""

import float64
import pytest
import simt_ops
import torch
from cases import DTYPES, stacked_rows
from simt_ops import A100, CHOSEN, H200, ONE_MULTIPROCESSOR
from tolerances import LOSS_ATOL, LOSS_RTOL, ROUNDING, assert_close

OPTIONS = (
    {},
    {"label_smoothing": 0.1},
    {"z_loss": 1e-3},
    {"label_smoothing": 0.3, "z_loss": 1e-2, "temperature": 1.7},
    {"temperature": 0.3},
)
SPLIT_VOCAB = 9 * 2048 + 3
# Clusters of 1, 2, 4 and 8 blocks hold 17, 34, 68 and 136 tiles of 4 KB with room to spare, and 8
# blocks up to 448
CLUSTER_VOCABS = {1: 2100, 2: 18 * 2048, 4: 35 * 2048 - 5, 8: 69 * 2048}


def random_case(dtype, vocab_size=300, tokens=9, ignored=(3, 7)):
    generator = torch.manual_seed(vocab_size)
    logits = [
        (3 * torch.randn(tokens, vocab_size, generator=generator)).to(dtype) for _ in range(2)
    ]
    target = torch.randint(0, vocab_size, (tokens,), generator=generator)
    for row in ignored:
        if row < tokens:
            target[row] = -100
    return logits, target


def loss_in_float64(logits, target, **options):
    safe = target.clamp(min=0)
    return torch.where(target < 0, 0.0, float64.token_loss(logits, safe, **options))


def gradients_in_float64(logits, target, weight, **options):
    wide = logits.double().requires_grad_()
    loss_in_float64(wide, target, **options).backward(weight.double())
    return wide.grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [1, 7, 127, 2049, 5000])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_edge_cases(dtype, vocab_size, options):
    _, logits = stacked_rows(vocab_size, dtype)
    logits = logits[[i for i, row in enumerate(logits) if row.isfinite().all()]]
    for target_id in {3 % vocab_size, vocab_size - 1}:
        target = torch.full((len(logits),), target_id)
        (loss, _), (lse, _) = simt_ops.oput_loss_with_logsumexp(logits, None, target, **options)
        assert_close(loss, float64.token_loss(logits, target, **options), LOSS_RTOL, LOSS_ATOL)
        x = logits.double() / options.get("temperature", 1.0)
        assert_close(lse, x.logsumexp(dim=-1), 1e-6, 1e-6)


@pytest.mark.parametrize("vocab_size", [127, 5000])
def test_rows_that_are_not_finite(vocab_size):
    names, logits = stacked_rows(vocab_size, torch.float32)
    target = torch.full((len(names),), 4)
    loss, _ = simt_ops.oput_loss(logits, None, target)
    expected = -torch.log_softmax(logits.double(), dim=-1)[:, 4]
    # log_softmax of a +inf row is -inf at finite targets, and NaN at the infinite one
    expected = expected.masked_fill((logits == torch.inf).any(dim=-1), torch.nan)
    assert_close(loss, expected, LOSS_RTOL, LOSS_ATOL)


@pytest.mark.parametrize(("gpu", "splits"), [(H200, 2), (ONE_MULTIPROCESSOR, 1)])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "temperature": 0.6}], ids=str)
def test_both_passes_and_splits(gpu, splits, options):
    logits, target = random_case(torch.bfloat16, SPLIT_VOCAB, tokens=4)
    losses = simt_ops.oput_loss(*logits, target.int(), **options, gpu=gpu)
    assert CHOSEN[-1].splits == splits
    for loss, x in zip(losses, logits, strict=True):
        assert_close(loss, loss_in_float64(x, target, **options), LOSS_RTOL, LOSS_ATOL)
    masked_only = simt_ops.oput_loss(logits[0], None, target, **options, gpu=gpu)
    predicted_only = simt_ops.oput_loss(None, logits[1], target, **options, gpu=gpu)
    assert masked_only[1] is None
    assert predicted_only[0] is None
    assert torch.equal(masked_only[0], losses[0])
    assert torch.equal(predicted_only[1], losses[1])


def test_ignored_rows_and_targets_outside():
    """Ignored: 0, and not read. Outside [0, V): NaN in that row alone."""
    logits, target = random_case(torch.float32)
    logits[0][3] = torch.nan
    target[1], target[5] = 300, -7
    loss, _ = simt_ops.oput_loss(logits[0], None, target)
    assert loss[3] == loss[7] == 0
    assert loss.isnan().nonzero().squeeze(-1).tolist() == [1, 5]
    written = logits[0].clone()
    in_place, _ = simt_ops.oput_loss_and_grad_(written, None, target)
    assert torch.equal(in_place.nan_to_num(9.0), loss.nan_to_num(9.0))
    assert written[[1, 5]].isnan().all()
    assert written[[0, 2, 4, 6, 8]].isfinite().all()
    assert (written[[3, 7]] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [1, 7, 300, 2049])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_backward(dtype, vocab_size, options):
    logits, target = random_case(dtype, vocab_size)
    weight = torch.randn(len(target), generator=torch.manual_seed(2))
    _, (lse, _) = simt_ops.oput_loss_with_logsumexp(logits[0], None, target, **options)
    actual = simt_ops.oput_loss_backward(weight, logits[0], target, lse, **options)
    expected = gradients_in_float64(logits[0], target, weight, **options)
    assert_close(actual, expected, ROUNDING[dtype], 2e-6)
    assert (actual[target < 0] == 0).all()


# Every cluster size, and the two-pass kernel that serves GPUs without clusters: both agree with
# float64, and with each other and the forward op to the last bit
@pytest.mark.parametrize("options", OPTIONS[::3], ids=str)
@pytest.mark.parametrize("cluster", [1, 2, 4, 8])
def test_in_place(cluster, options):
    vocab_size = CLUSTER_VOCABS[cluster]
    logits, target = random_case(torch.bfloat16, vocab_size, tokens=2, ignored=())
    grad = torch.tensor([0.7, -1.3])
    written = [x.clone() for x in logits]
    losses = simt_ops.oput_loss_and_grad_(*written, target, grad, None, **options)
    assert CHOSEN[-1].cluster == cluster
    forward = simt_ops.oput_loss(*logits, target, **options)
    for x, gradient, loss, weight, other in zip(
        logits, written, losses, (grad, torch.ones(2)), forward, strict=True
    ):
        assert torch.equal(loss, other)
        expected = gradients_in_float64(x, target, weight, **options)
        assert_close(gradient, expected, ROUNDING[torch.bfloat16], 1e-7)
    two_pass = [x.clone() for x in logits]
    two_pass_losses = simt_ops.oput_loss_and_grad_(
        *two_pass, target, grad, None, **options, gpu=A100
    )
    assert CHOSEN[-1].cluster == 0
    for a, b in zip((*written, *losses), (*two_pass, *two_pass_losses), strict=True):
        assert torch.equal(a, b)


# Every exponent is relative to the row's maximum: an offset costs the loss and the gradient no
# digits
@pytest.mark.parametrize("gpu", [H200, A100], ids=["cluster", "two_pass"])
@pytest.mark.parametrize("offset", [3e4, -1e6])
def test_in_place_common_offset(gpu, offset):
    steps = torch.randint(0, 60, (4, 3000), generator=torch.manual_seed(5))
    logits = (offset - 0.125 * steps.double()).float()
    target = steps.argmin(dim=-1)
    written = logits.clone()
    loss, _ = simt_ops.oput_loss_and_grad_(written, None, target, None, None, gpu=gpu)
    assert_close(loss, float64.token_loss(logits, target), LOSS_RTOL, LOSS_ATOL)
    expected = gradients_in_float64(logits, target, torch.ones(4))
    assert_close(written, expected, ROUNDING[torch.float32], 1e-9)


# Dtypes, tails and misaligned rows, an absent pass, ignored rows: on both kernels
@pytest.mark.parametrize("gpu", [H200, A100], ids=["cluster", "two_pass"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [1, 7, 300, 2049])
def test_in_place_edges(gpu, dtype, vocab_size):
    options = {"temperature": 0.6}
    logits, target = random_case(dtype, vocab_size)
    weight = torch.randn(len(target), generator=torch.manual_seed(2))
    written = logits[1].clone()
    none, loss = simt_ops.oput_loss_and_grad_(
        None, written, target, None, weight, **options, gpu=gpu
    )
    assert none is None
    assert_close(loss, loss_in_float64(logits[1], target, **options), LOSS_RTOL, LOSS_ATOL)
    expected = gradients_in_float64(logits[1], target, weight, **options)
    assert_close(written, expected, ROUNDING[dtype], 1e-6)


# A row that no cluster of 8 can hold takes the two-pass kernel on any GPU
def test_in_place_row_beyond_a_cluster():
    small = (132, 9, 40 * 1024, 0)
    logits, target = random_case(torch.float32, 90 * 1024, tokens=1, ignored=())
    written = logits[0].clone()
    simt_ops.oput_loss_and_grad_(written, None, target, gpu=small)
    assert CHOSEN[-1].cluster == 0
    expected = gradients_in_float64(logits[0], target, torch.ones(1))
    assert_close(written, expected, ROUNDING[torch.float32], 1e-6)


@pytest.mark.parametrize(
    ("name", "seed", "resident"),
    [("reversed", 0, 1), ("reversed", 0, 8), ("random", 0, 1), ("random", 1, 8)],
)
def test_in_any_order(name, seed, resident):
    logits, target = random_case(torch.bfloat16, 18 * 2048, tokens=3)
    results = []
    for each in (("in order", 0, 1), (name, seed, resident)):
        with simt_ops.order(*each):
            cluster, two_pass = logits[0].clone(), logits[0].clone()
            forward = simt_ops.oput_loss(*logits, target)
            loss, _ = simt_ops.oput_loss_and_grad_(cluster, None, target)
            simt_ops.oput_loss_and_grad_(two_pass, None, target, gpu=A100)
        results.append([*forward, loss, cluster, two_pass])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
