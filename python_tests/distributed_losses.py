"""The losses over a sharded vocabulary: what a rank of distributed_process.py checks."""

import pytest
import torch
from ranks import Ranks
from tolerances import (
    LOSS_ATOL,
    LOSS_RTOL,
    ROUNDING,
    assert_close,
)

import dmax_kernels
from dmax_kernels import distributed, reference
from dmax_kernels.vocabulary import mask_words

LOSS_OPTIONS = (
    {},
    {"label_smoothing": 0.1, "z_loss": 1e-3},
    {"reduction": "mean", "pass_weights": (0.25, 2.0), "label_smoothing": 1.0},
    {"reduction": "sum", "token_weight": torch.rand(28, generator=torch.manual_seed(1)),
     "temperature": 0.6},
    {"label_smoothing": 0.1, "z_loss": 1e-3, "temperature": 1.7},
)  # fmt: skip


def gradients(loss, leaves, weight):
    """d (sum of weight * losses) / d leaves, for a pair of losses or a scalar."""
    if torch.is_tensor(loss):
        return torch.autograd.grad(loss, leaves)
    kept = [each for each in loss if each is not None]
    return torch.autograd.grad(sum((each * weight).sum() for each in kept), leaves)


def check_loss(ranks: Ranks) -> None:
    rows = 28
    weight = ranks.randn(rows)
    for vocab, dtype in ((300, torch.float32), (301, torch.bfloat16)):
        passes = [3 * ranks.randn(rows, vocab, dtype=dtype) for _ in range(2)]
        target = torch.randint(0, vocab, (rows,), generator=ranks.generator)
        target[3] = target[9] = -100
        passes[0][9] = torch.nan  # ignored
        passes[0][4, target[4]] = 40.0  # a loss next to 0
        passes[1][5] += 1e3  # a common offset
        passes[0][6, : vocab // 2] = -torch.inf  # shards without mass
        target[6] = vocab - 1
        for options in LOSS_OPTIONS:
            if options.get("label_smoothing"):  # a -inf makes the mean, and so the loss, infinite
                passes[0][6, : vocab // 2] = -9.0
            leaves = [x.clone().requires_grad_() for x in passes]
            expected = dmax_kernels.oput_loss(*leaves, target, **options)
            expected_grads = gradients(expected, leaves, weight)
            for sizes, vocab_size in ranks.layouts(vocab):
                mine = [ranks.cut(x, sizes, 1).requires_grad_() for x in passes]
                layout = {"shard_sizes": sizes, "vocab_size": vocab_size}
                actual = distributed.oput_loss(*mine, target, **layout, **options)
                reduced = "reduction" in options
                pairs = ((actual,), (expected,)) if reduced else (actual, expected)
                for a, e in zip(*pairs, strict=True):
                    assert_close(a.detach(), e.detach(), 2 * LOSS_RTOL, 2 * LOSS_ATOL)
                for x, g, e in zip(
                    mine, gradients(actual, mine, weight), expected_grads, strict=True
                ):
                    padded = torch.cat([e, e.new_zeros(rows, sum(sizes) - vocab)], 1)
                    assert g.shape == x.shape
                    # both round once to the dtype, from float32 exponentials at the offset of 1e3
                    e = ranks.cut(padded, sizes, 1)
                    assert_close(g[5], e[5], 1e-3, 1e-4)
                    keep = torch.arange(rows) != 5
                    # 1e-7: the rounding of the unsharded op's logsumexp, which is 1 / T as large
                    atol = 1e-7 / options.get("temperature", 1.0) ** 2
                    assert_close(g[keep], e[keep], 2 * ROUNDING[dtype] + 4e-6, atol)
    one = distributed.oput_loss(None, mine[1], target, **layout)
    assert one[0] is None
    assert_close(one[1].detach(), dmax_kernels.oput_loss(None, passes[1], target)[1], 2e-6, 2e-7)


def check_what_breaks_a_gradient(ranks: Ranks) -> None:
    """Ids that change before the backward pass, as in static buffers, and second derivatives."""
    mask = torch.full((1, mask_words(20 * ranks.num_ranks)), -1, dtype=torch.int32)
    logits, hidden, weight = ranks.randn(6, 20), ranks.randn(6, 4), ranks.randn(20, 4)
    target = torch.arange(6)
    ids, of = (target,), distributed  # elsewhere, and of the mask, a copy is saved
    for leaf, function, changes in (
        (logits, lambda x: of.oput_loss(x, None, target)[0], ids),
        (logits, lambda x: of.target_logprobs(x, target).logprob, ids),
        (logits, lambda x: of.token_logprobs(x, target, allowed=mask).logprob, ids),
        (hidden, lambda h: of.linear_oput_loss(h, None, weight, target)[0], ()),
        (hidden, lambda h: of.linear_oput_loss(h, None, weight, target, reduction="sum"), ()),
        (hidden, lambda h: of.linear_target_logprobs(h, weight, target).logprob, ids),
        (hidden, lambda h: of.linear_token_logprobs(h, weight, target, allowed=mask)[0], ids),
    ):
        leaf.requires_grad_()
        total = function(leaf * leaf).sum()
        (gradient,) = torch.autograd.grad(total, leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="has no second derivative"):
            gradient.square().sum().backward()
        for change in changes:
            total = function(leaf).sum()
            change.add_(0)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                total.backward()


def check_autocast(ranks, hidden, weight, target) -> None:
    """float32 parameters under autocast: the loss of their bfloat16 copies, to the bit."""
    mine = ranks.cut(weight, [len(weight) // ranks.num_ranks + 1] * ranks.num_ranks, 0)
    options = {"vocab_size": len(weight)}
    half = (hidden.bfloat16(), None, mine.bfloat16())
    expected, _ = distributed.linear_oput_loss(*half, target, **options)
    with torch.autocast("cpu", torch.bfloat16):
        actual, _ = distributed.linear_oput_loss(
            hidden.float(), None, mine.float(), target, **options
        )
    assert torch.equal(actual, expected)


def check_linear_loss(ranks: Ranks) -> None:
    vocab, dim, rows = 4300, 12, 28
    for dtype in (torch.float32, torch.bfloat16):
        hidden = [ranks.randn(rows, dim, dtype=dtype) for _ in range(2)]
        weight, bias = ranks.randn(vocab, dim, dtype=dtype), ranks.randn(vocab, dtype=dtype)
        target = torch.randint(0, vocab, (rows,), generator=ranks.generator)
        target[3] = -100
        row_weight = ranks.randn(rows)
        options = {"label_smoothing": 0.1, "z_loss": 1e-3, "temperature": 1.7}
        leaves = [x.clone().float().requires_grad_() for x in (*hidden, weight, bias)]
        check_autocast(ranks, hidden[0], weight, target)
        logits = [x @ leaves[2].t() + leaves[3] for x in leaves[:2]]
        expected = reference.oput_loss(*logits, target, **options)
        expected_grads = gradients(expected, leaves, row_weight)
        for sizes, vocab_size in ranks.layouts(vocab):
            layout = {"shard_sizes": sizes, "vocab_size": vocab_size}
            head = [ranks.cut(x, sizes, 0) for x in (weight, bias)]
            mine = [x.clone().requires_grad_() for x in (*hidden, *head)]
            actual = distributed.linear_oput_loss(
                *mine[:3], target, bias=mine[3], **layout, **options
            )
            for a, e in zip(actual, expected, strict=True):
                assert_close(a.detach(), e.detach(), 2e-6, 1e-6)
            total, by_pass = distributed.linear_oput_loss(
                *mine[:3], target, bias=mine[3], token_weight=row_weight, reduction="sum",
                by_pass=True, **layout, **options,
            )  # fmt: skip
            for part, each in zip(by_pass, actual, strict=True):
                assert_close(part, (row_weight * each.detach()).sum(), 1e-5, 1e-5)
            # The gradients that come with the sum, then those that are computed again
            at_once, again = (torch.autograd.grad(total, mine, retain_graph=True) for _ in "12")
            grads = gradients(actual, mine, row_weight)
            shards = [*expected_grads[:2]]
            for e in expected_grads[2:]:
                missing = e.new_zeros(sum(sizes) - vocab, *e.shape[1:])
                kept = ranks.cut(torch.cat([e, missing]), sizes, 0)
                shards.append(kept)
            for made in (at_once, again):
                for g, e in zip(made, grads, strict=True):
                    assert_close(g, e, ROUNDING[dtype], 1e-5)
            for g, e in zip(grads, shards, strict=True):
                # the gradient of the logits is rounded to the dtype before the products
                close = 2 * ROUNDING[dtype] + 1e-5
                assert_close(g, e, close, close * e.abs().amax().item() if e.numel() else 0)


def check_target_logprobs(ranks: Ranks) -> None:
    vocab, rows = 301, 20
    logits = 3 * ranks.randn(rows, vocab)
    logits[2] = -torch.inf
    logits[3, : vocab // 2] = -torch.inf  # shards without mass
    logits[4, vocab - 1] = torch.nan
    logits[5, 7] = torch.inf
    logits[6] += 3000.0
    logits[7] = 0.0  # ties on every shard
    target = torch.randint(0, vocab, (rows,), generator=ranks.generator)
    target[3] = vocab - 1
    target[9] = -100
    weight = ranks.randn(2, rows)
    for dtype in (torch.float32, torch.bfloat16):
        x, options = logits.to(dtype).requires_grad_(), {"temperature": 0.7}
        expected = dmax_kernels.target_logprobs(x, target, **options)
        for sizes, vocab_size in ranks.layouts(vocab):
            layout = {"shard_sizes": sizes, "vocab_size": vocab_size}
            mine = ranks.cut(x.detach(), sizes, 1).requires_grad_()
            actual = distributed.target_logprobs(mine, target, **layout, **options)
            assert_close(actual.logprob.detach(), expected.logprob.detach(), 2e-6, 4e-7)
            assert_close(actual.entropy.detach(), expected.entropy.detach(), 4e-6, 1e-6)
            assert torch.equal(actual.token, expected.token)
            assert torch.equal(actual.correct, expected.correct)
            for used in (1, 2):  # of the two that have a gradient
                total, whole = (
                    sum((w * v).sum() for w, v in zip(weight[:used], found[:used], strict=True))
                    for found in (actual, expected)
                )
                (grad,) = torch.autograd.grad(total, mine, retain_graph=True)
                (all_of_it,) = torch.autograd.grad(whole, x, retain_graph=True)
                padding = all_of_it.new_zeros(rows, sum(sizes) - vocab)
                share = ranks.cut(torch.cat([all_of_it, padding], 1), sizes, 1)
                assert_close(grad, share, 2 * ROUNDING[dtype], 3e-6)


def check_linear_target_logprobs(ranks: Ranks) -> None:
    vocab, dim, rows = 9001, 12, 6  # several blocks of columns, in numbers that differ by rank
    target = torch.randint(0, vocab, (2, rows // 2), generator=ranks.generator)
    target[0, 1] = -100
    for dtype in (torch.float32, torch.bfloat16):
        hidden = ranks.randn(2, rows // 2, dim, dtype=dtype)
        hidden[0, 1] = torch.nan  # ignored
        head = ranks.randn(vocab, dim, dtype=dtype), ranks.randn(vocab, dtype=dtype)
        leaves = [x.clone().requires_grad_() for x in (hidden, *head)]
        options = {"temperature": 1.7}
        expected = dmax_kernels.linear_target_logprobs(
            *leaves[:2], target, bias=leaves[2], **options
        )
        total = (expected.logprob - 0.3 * expected.entropy).sum()
        expected_grads = torch.autograd.grad(total, leaves)
        for sizes, vocab_size in ranks.layouts(vocab):
            layout = {"shard_sizes": sizes, "vocab_size": vocab_size}
            mine = [hidden.clone(), *(ranks.cut(x, sizes, 0) for x in head)]
            mine = [x.requires_grad_() for x in mine]
            actual = distributed.linear_target_logprobs(
                *mine[:2], target, bias=mine[2], **layout, **options
            )
            for a, e in zip(actual[:2], expected[:2], strict=True):
                assert_close(a.detach(), e.detach(), 4e-6, 2e-6)
            assert torch.equal(actual.token, expected.token)
            grads = torch.autograd.grad((actual.logprob - 0.3 * actual.entropy).sum(), mine)
            missing = sum(sizes) - vocab
            shares = [expected_grads[0]] + [
                ranks.cut(torch.cat([e, e.new_zeros(missing, *e.shape[1:])]), sizes, 0)
                for e in expected_grads[1:]
            ]
            for g, e in zip(grads, shares, strict=True):
                scale = e.float().abs().amax().item() if e.numel() else 0.0
                assert_close(g, e, 2 * ROUNDING[dtype] + 1e-5, (ROUNDING[dtype] + 1e-6) * scale)
