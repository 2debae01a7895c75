"""One rank of test_distributed.py: every check of the package over a gloo group.

All ranks draw the same whole-vocabulary tensors from one generator, cut them at the same random
places, and compare what dmax_kernels.distributed returns with the unsharded op.
"""

import datetime
import re

import pytest
import torch
import torch.distributed as dist
from cases import DTYPES, stacked_rows
from distributed_draws import check_draws, check_filters
from ranks import SEED, Ranks, assert_same
from test_docs import ROOT, python_blocks
from tolerances import (
    LOSS_ATOL,
    LOSS_RTOL,
    ROUNDING,
    assert_close,
)

import dmax_kernels
from dmax_kernels import distributed, reference


def check_decoding(ranks: Ranks) -> None:
    for vocab, dtype in ((1500, torch.float32), (4099, torch.bfloat16), (127, torch.float16)):
        _, edges = stacked_rows(vocab, dtype)
        logits = torch.cat([edges, 3 * ranks.randn(40, vocab, dtype=dtype)])
        per_row = torch.stack([torch.arange(len(logits)) * 2**33, torch.arange(len(logits))], 1)
        for sizes, vocab_size in ranks.layouts(vocab):
            mine = ranks.cut(logits, sizes, 1)
            layout = {"shard_sizes": sizes, "vocab_size": vocab_size}
            for options in ({}, {"temperature": 0.3, "suppress_token": vocab - 1}):
                assert_same(
                    distributed.top1_confidence(mine, **layout, **options),
                    dmax_kernels.top1_confidence(logits, **options),
                )
                for seed in (SEED, per_row):
                    assert_same(
                        distributed.sample_tokens(mine, seed, **layout, **options),
                        dmax_kernels.sample_tokens(logits, seed, **options),
                    )
            greedy = distributed.sample_tokens(mine, SEED, **layout, temperature=0)
            assert_same(greedy[:2], dmax_kernels.top1_confidence(logits))


def check_masks(ranks: Ranks) -> None:
    """Top-1 of what a mask allows, in shards that begin inside its words, too."""
    vocab, rows, dim = 1000, 20, 8
    logits = 3 * ranks.randn(rows, vocab)
    logits[4, 700] = torch.nan
    mask = torch.randint(-(2**31), 2**31, (rows, 32), generator=ranks.generator).int()
    mask[5] = 0
    hidden, weight = ranks.randn(rows, dim), ranks.randn(vocab, dim)
    for sizes, vocab_size in ranks.layouts(vocab):
        layout = {"shard_sizes": sizes, "vocab_size": vocab_size}
        for options in ({"allowed": mask}, {"allowed": mask[:1], "suppress_tokens": (5, 999)}):
            assert_same(
                distributed.top1_confidence(ranks.cut(logits, sizes, 1), **layout, **options),
                dmax_kernels.top1_confidence(logits, **options),
            )
            assert_same(
                distributed.linear_top1_confidence(
                    hidden, ranks.cut(weight, sizes, 0), **layout, **options
                ),
                dmax_kernels.linear_top1_confidence(hidden, weight, **options),
                rtol=1e-5,
            )


def check_ties(ranks: Ranks) -> None:
    """Equal logits on every shard, and unequal ones that are equal once divided by 3."""
    vocab = 8 * ranks.num_ranks
    ties = torch.zeros(1, vocab)
    token, _ = distributed.top1_confidence(ranks.cut(ties, [8] * ranks.num_ranks, 1))
    assert token.tolist() == [0]
    low, high = 1.5 + 2**-23, 1.5 + 2**-22
    assert torch.tensor(low) / 3 == torch.tensor(high) / 3
    ties[0, 3], ties[0, -1] = low, high
    mine = ranks.cut(ties, [8] * ranks.num_ranks, 1)
    token, _ = distributed.top1_confidence(mine, temperature=3.0)
    assert token.tolist() == [vocab - 1]


def check_linear(ranks: Ranks) -> None:
    vocab, dim = 9001, 16  # several blocks of columns, in numbers that differ between ranks
    hidden, bias = ranks.randn(3, 5, dim), ranks.randn(vocab)
    weight = ranks.randn(vocab, dim)
    for sizes, vocab_size in ranks.layouts(vocab):
        layout = {"shard_sizes": sizes, "vocab_size": vocab_size}
        mine = ranks.cut(weight, sizes, 0), ranks.cut(bias, sizes, 0)
        options = {"temperature": 0.7, "suppress_token": 5}
        assert_same(
            distributed.linear_top1_confidence(hidden, *mine, **layout, **options),
            dmax_kernels.linear_top1_confidence(hidden, weight, bias, **options),
            rtol=1e-5,
        )
        for more in ({"temperature": 0}, {}, {"top_k": 20, "suppress_tokens": (5, 8)}):
            options |= more
            assert_same(
                distributed.linear_sample_tokens(
                    hidden, mine[0], SEED, mine[1], **layout, **options
                ),
                dmax_kernels.linear_sample_tokens(hidden, weight, SEED, bias, **options),
                rtol=1e-5,
            )


def check_hybrid_embedding(ranks: Ranks) -> None:
    for dtype in DTYPES:
        for k in (1, 3):
            vocab, dim, mask = 61, 13, 60
            embedding = ranks.randn(vocab, dim, dtype=dtype)
            embedding[7, 0] = -0.0
            token = torch.randint(0, vocab, (4, 9, k), generator=ranks.generator)
            token[0, :3] = 7  # repeated, and the mask itself
            token[1, 0] = mask
            token = token.squeeze(-1)
            confidence = torch.rand(token.shape, generator=ranks.generator) / k
            masked = torch.rand(4, 9, generator=ranks.generator) < 0.3
            token[masked] = -5  # never looked at
            grad = ranks.randn(4, 9, dim, dtype=dtype)

            def run(function, table, token=token, c=confidence, m=masked, g=grad, **layout):
                leaves = table.requires_grad_(), c.clone().requires_grad_()
                out = function(leaves[0], token, leaves[1], m, 60, **layout)
                return out.detach(), *torch.autograd.grad(out, leaves, g)

            plain = token.masked_fill(masked.unsqueeze(-1) if k > 1 else masked, 0)
            expected = run(dmax_kernels.hybrid_embedding, embedding.clone(), plain)
            for sizes, vocab_size in ranks.layouts(vocab):
                mine = ranks.cut(embedding, sizes, 0)
                out, grad_table, grad_confidence = run(
                    distributed.hybrid_embedding, mine, shard_sizes=sizes, vocab_size=vocab_size
                )
                bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
                assert torch.equal(out.view(bits), expected[0].view(bits))
                assert torch.equal(grad_confidence, expected[2])
                padded = torch.cat([expected[1], expected[1].new_zeros(sum(sizes) - vocab, dim)])
                assert torch.equal(grad_table, ranks.cut(padded, sizes, 0))


def check_soft_embedding(ranks: Ranks) -> None:
    for vocab, dtype in ((1500, torch.float32), (127, torch.bfloat16)):
        _, edges = stacked_rows(vocab, torch.float32)
        logits = torch.cat([edges, 3 * ranks.randn(10, vocab)])
        embedding, temperature = ranks.randn(vocab, 13, dtype=dtype), torch.rand(len(logits)) + 0.5
        dist.broadcast(temperature, 0)
        for options in (
            {"temperature": 0.3},
            {"temperature": temperature},
            {"temperature": temperature, "top_p": 0.7},
        ):
            expected = dmax_kernels.soft_embedding(logits, embedding, **options)
            for sizes, vocab_size in ranks.layouts(vocab):
                actual = distributed.soft_embedding(
                    ranks.cut(logits, sizes, 1),
                    ranks.cut(embedding, sizes, 0),
                    shard_sizes=sizes,
                    vocab_size=vocab_size,
                    **options,
                )
                assert actual.dtype == dtype
                assert_close(actual, expected, 2 * ROUNDING[dtype], 2e-6)


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


def check_dtensor(ranks: Ranks) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (ranks.num_ranks,))
    vocab = 5 * ranks.num_ranks - 3  # the last rank's shard is shorter
    logits, table = ranks.randn(6, vocab), ranks.randn(vocab, 8)
    sharded = distribute_tensor(logits, mesh, [Shard(1)])
    assert_same(distributed.top1_confidence(sharded), dmax_kernels.top1_confidence(logits))
    assert_same(distributed.sample_tokens(sharded, SEED), dmax_kernels.sample_tokens(logits, SEED))
    leaf = distribute_tensor(table, mesh, [Shard(0)]).requires_grad_()
    target = torch.randint(0, vocab, (6,), generator=ranks.generator)
    hidden = ranks.randn(6, 8)
    distributed.linear_oput_loss(hidden, None, leaf, target, reduction="sum").backward()
    assert isinstance(leaf.grad, DTensor)
    plain = table.clone().requires_grad_()
    reference.oput_loss(hidden @ plain.t(), None, target, reduction="sum").backward()
    assert_close(leaf.grad.full_tensor(), plain.grad, 1e-4, 1e-6)
    token, _ = dmax_kernels.top1_confidence(logits)
    arguments = token, torch.rand(6, generator=ranks.generator), token == token[0], 2
    actual = distributed.hybrid_embedding(leaf, *arguments)
    assert torch.equal(actual, dmax_kernels.hybrid_embedding(table, *arguments))
    replicated = DTensor.from_local(logits, mesh, [Replicate()])
    assert_fails(
        lambda: distributed.top1_confidence(replicated), "must be a DTensor with Shard(1) on one"
    )
    assert_fails(
        lambda: distributed.top1_confidence(sharded, shard_sizes=[1]), "shard_sizes must be None"
    )


def assert_fails(call, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def check_errors(ranks: Ranks) -> None:
    """Every rank raises the same error; otherwise the others would wait for ever."""
    width = 4 if ranks.rank == 0 else 5
    uneven = torch.ones(2, width)
    widths = [4, *[5] * (ranks.num_ranks - 1)]
    assert distributed.gather_shard_sizes(uneven) == tuple(widths)
    for call in (
        lambda: distributed.top1_confidence(uneven),
        lambda: distributed.oput_loss(uneven, None, torch.tensor([0, 1])),
        lambda: distributed.hybrid_embedding(
            uneven.t(), torch.zeros(2).long(), torch.ones(2), torch.ones(2) > 2, 0
        ),
    ):
        assert_fails(call, f"the ranks' shards are {widths} ids wide")
    mixed = torch.ones(2, 4, dtype=torch.float32 if ranks.rank == 0 else torch.bfloat16)
    assert_fails(lambda: distributed.gather_shard_sizes(mixed), "must have one dtype")
    assert_fails(lambda: distributed.top1_confidence(mixed), "every rank's shard must have one")
    even, count = torch.ones(2, 4), ranks.num_ranks
    target = torch.tensor([0, 4 * count])
    for call, message in (
        (lambda: distributed.top1_confidence(even, shard_sizes=[4]), f"must be {count} widths"),
        (
            lambda: distributed.top1_confidence(even, shard_sizes=[3] * count),
            "logits must be 3 ids wide on rank",
        ),
        (
            lambda: distributed.top1_confidence(even, vocab_size=4 * count + 1),
            f"vocab_size must be in 1..{4 * count}, ",
        ),
        (
            lambda: distributed.sample_tokens(even, SEED, suppress_token=4 * count),
            f"suppress_token must be -1 (none) or a token id below {4 * count}",
        ),
        (lambda: distributed.oput_loss(even, None, target), f"got {4 * count} at position 1"),
        (
            lambda: distributed.target_logprobs(even, target),
            f"target_logprobs: target must be -100 (ignore_index) or a token id in [0, {4 * count}",
        ),
        (
            lambda: distributed.target_logprobs(even, target[:1]),
            "target_logprobs: target must have shape [2]",
        ),
        (lambda: distributed.oput_loss(None, None, target), "got neither"),
        (lambda: distributed.oput_loss(even, None, target[:1]), "target must have shape [2]"),
        (
            lambda: distributed.oput_loss(even, None, target, temperature=0.0),
            "oput_loss: temperature must be 1e-30 to 1e30, got 0",
        ),
        (
            lambda: distributed.oput_loss(even, None, target, label_smoothing=2.0),
            "label_smoothing must be in [0, 1], got 2",
        ),
        (
            lambda: distributed.hybrid_embedding(
                even.t(), target, torch.ones(2), torch.zeros(2) > 1, 0
            ),
            f"token must be in [0, {4 * count}) where masked is False, got an id outside at pos",
        ),
        (
            lambda: distributed.hybrid_embedding(
                even, target, torch.ones(2), torch.zeros(2) > 1, 2 * count
            ),
            f"mask_token_id must be a token id in [0, {2 * count})",
        ),
        (
            lambda: distributed.linear_top1_confidence(torch.ones(2, 5), even),
            "hidden must be [..., D] with D = 4",
        ),
    ):
        assert_fails(call, message)


def check_page(ranks: Ranks) -> None:
    """The code of docs/distributed.md, which test_docs.py runs with one rank."""
    namespace = {}
    for block in python_blocks(ROOT / "docs/distributed.md"):
        exec(compile(block, "distributed.md", "exec"), namespace)
    assert namespace["num_ranks"] == ranks.num_ranks
    assert torch.equal(namespace["token"], namespace["logits"].argmax(dim=-1))
    hidden, head, token = namespace["hidden"], namespace["head"], namespace["token"]
    plain = hidden.detach().clone().requires_grad_()
    logits = plain @ head[: namespace["V"]].t()
    reference.oput_loss(logits, None, token, reduction="mean").backward()
    assert_close(hidden.grad, plain.grad, 1e-4, 1e-6)


CHECKS = (
    check_decoding,
    check_draws,
    check_masks,
    check_filters,
    check_ties,
    check_linear,
    check_hybrid_embedding,
    check_soft_embedding,
    check_loss,
    check_linear_loss,
    check_target_logprobs,
    check_linear_target_logprobs,
    check_dtensor,
    check_errors,
    check_page,
)


def main(rank: int, num_ranks: int, rendezvous: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=num_ranks,
        timeout=datetime.timedelta(seconds=120),
    )
    try:
        for check in CHECKS:
            check(Ranks(rank, num_ranks))
    finally:
        dist.destroy_process_group()
