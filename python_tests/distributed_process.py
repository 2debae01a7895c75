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
from distributed_logprobs import check_linear_token_logprobs, check_token_logprobs
from distributed_losses import (
    check_linear_loss,
    check_linear_target_logprobs,
    check_loss,
    check_target_logprobs,
    check_what_breaks_a_gradient,
)
from distributed_statistics import (
    check_row_statistics,
    check_statistics_bytes,
    check_statistics_shapes,
    check_topk_confidence,
)
from ranks import SEED, Ranks, assert_same
from test_docs import ROOT, python_blocks
from tolerances import (
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


def check_no_rows(ranks: Ranks) -> None:
    mine = torch.empty(2, 0, 7)
    token, confidence = distributed.top1_confidence(mine)
    assert (token.shape, token.dtype) == ((2, 0), torch.int64)
    assert (confidence.shape, confidence.dtype) == ((2, 0), torch.float32)
    assert distributed.sample_tokens(mine, SEED).token.shape == (2, 0)
    assert distributed.sample_tokens(mine, SEED, top_k=3).token.shape == (2, 0)


def check_no_gradient(ranks: Ranks) -> None:
    """What has no gradient says so; beside a loss that has one, it would go unnoticed."""
    logits = ranks.randn(4, 8).requires_grad_()
    hidden, weight = ranks.randn(4, 3).requires_grad_(), ranks.randn(8, 3).requires_grad_()
    results = (
        distributed.top1_confidence(logits)[1],
        distributed.topk_confidence(logits, 2)[1],
        distributed.row_statistics(logits).entropy,
        distributed.sample_tokens(logits, SEED)[1],
        distributed.sample_tokens(logits, SEED, top_k=3)[1],
        distributed.sample_tokens(logits, SEED, top_p=0.9)[1],
        distributed.linear_top1_confidence(hidden, weight)[1],
        distributed.linear_sample_tokens(hidden, weight, SEED)[1],
        distributed.soft_embedding(logits, weight),
    )
    for result in results:
        with pytest.raises(RuntimeError, match="has no gradient"):
            result.sum().backward()


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
            # Shards round weights relative to their own maxima: two roundings there, two here (see
            # docs/semantics.md), and one of each result, all of sum p |e|
            size = dmax_kernels.soft_embedding(logits, embedding.abs(), **options).double()
            for sizes, vocab_size in ranks.layouts(vocab):
                actual = distributed.soft_embedding(
                    ranks.cut(logits, sizes, 1),
                    ranks.cut(embedding, sizes, 0),
                    shard_sizes=sizes,
                    vocab_size=vocab_size,
                    **options,
                )
                assert actual.dtype == dtype
                assert torch.equal(actual.isnan(), expected.isnan())
                error = (actual.double() - expected.double()).abs()
                assert not (error > 6 * ROUNDING[dtype] * size).any()


def check_dtensor(ranks: Ranks) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (ranks.num_ranks,))
    vocab = 5 * ranks.num_ranks - 3  # the last rank's shard is shorter
    logits, table = ranks.randn(6, vocab), ranks.randn(vocab, 8)
    sharded = distribute_tensor(logits, mesh, [Shard(1)])
    assert_same(distributed.top1_confidence(sharded), dmax_kernels.top1_confidence(logits))
    ids = torch.arange(6) % vocab
    found, whole = (
        of.token_logprobs(x, ids) for of, x in ((distributed, sharded), (dmax_kernels, logits))
    )
    assert torch.equal(found.rank, whole.rank)
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
    assert torch.equal(namespace["report"].top_ids[:, 0], namespace["token"])
    assert torch.equal(namespace["statistics"].token, namespace["token"])
    hidden, head, token = namespace["hidden"], namespace["head"], namespace["token"]
    plain = hidden.detach().clone().requires_grad_()
    logits = plain @ head[: namespace["V"]].t()
    reference.oput_loss(logits, None, token, reduction="mean").backward()
    assert_close(hidden.grad, plain.grad, 1e-4, 1e-6)


CHECKS = (
    check_decoding,
    check_no_rows,
    check_no_gradient,
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
    check_what_breaks_a_gradient,
    check_token_logprobs,
    check_linear_token_logprobs,
    check_row_statistics,
    check_topk_confidence,
    check_statistics_shapes,
    check_statistics_bytes,
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
