"""Log-probabilities and ranks over a sharded vocabulary: what a rank of distributed_process.py
checks.
"""

import itertools

import pytest
import torch
import torch.distributed as dist
from cases import stacked_rows
from ranks import Ranks
from tolerances import ROUNDING, assert_close

import dmax_kernels
from dmax_kernels import distributed
from dmax_kernels.distributed import collectives, linear, logprob_parts


def assert_same(actual, expected, tolerance=2e-6):
    """Ids and ranks exactly, log-probabilities to rounding."""
    for mine, whole in zip(actual, expected, strict=True):
        assert mine.dtype == whole.dtype
        if whole.dtype.is_floating_point:
            assert_close(mine.detach(), whole.detach(), tolerance, tolerance)
        else:
            assert torch.equal(mine, whole), (mine - whole).nonzero()


def share_of(ranks: Ranks, whole, sizes, dim):
    """This rank's part of a gradient; that of padding is 0."""
    shape = list(whole.shape)
    shape[dim] = sum(sizes) - shape[dim]
    return ranks.cut(torch.cat([whole, whole.new_zeros(shape)], dim), sizes, dim)


def assert_gradient(actual, expected, logits, temperature=1.0, **_):
    """To the rounding of float32 logsumexps, which are as large as the logits, and of the dtype."""
    assert actual.dtype == expected.dtype == logits.dtype
    assert torch.equal(actual.isnan(), expected.isnan())
    size = logits.detach().double().nan_to_num(0, 0, 0).abs().amax(dim=1, keepdim=True)
    bound = (5e-6 + 1.2e-7 * size) / temperature**2
    bound = bound + 2 * ROUNDING[logits.dtype] * expected.double().abs()
    assert ((actual.double() - expected.double()).abs() <= bound)[~actual.isnan()].all()


def random_masks(ranks: Ranks, rows, vocab):
    """One for all rows; one a row, of which one allows nothing; both with ids of their own."""
    words = -(-vocab // 32)
    mask = torch.randint(-(2**31), 2**31, (rows, words), generator=ranks.generator).int()
    mask[2] = 0
    return {"allowed": mask[:1], "suppress_tokens": (0, vocab - 1)}, {"allowed": mask}


def check_token_logprobs(ranks: Ranks) -> None:
    """Every edge case of rows, in every layout, with every option that changes which tokens count;
    ids at ties, at the ends of the shards, ignored and of masked tokens, one a row and several.
    """
    for vocab, dtype in ((1003, torch.float32), (301, torch.bfloat16), (7, torch.float16)):
        _, edges = stacked_rows(vocab, dtype)
        x = torch.cat([edges, 3 * ranks.randn(6, vocab, dtype=dtype)]).requires_grad_()
        rows, top_n = len(x), min(20, vocab)
        ids = torch.randint(0, vocab, (rows, 9), generator=ranks.generator)
        ids[:, :5] = torch.tensor([0, 3, 6, vocab // 2, vocab - 1])
        ids[1, 2:4] = ids[3] = -100
        upstream = ranks.randn(rows, 9)
        for options in (
            {"top_n": top_n},
            {"temperature": 0.3, "suppress_tokens": (3,)},
            *random_masks(ranks, rows, vocab),
        ):
            options = {"top_n": 3, **options}
            for wanted, weight in ((ids, upstream), (ids[:, 5].int(), upstream[:, 5])):
                expected = dmax_kernels.token_logprobs(x, wanted, **options)
                (grad,) = torch.autograd.grad(expected.logprob, x, weight)
                for sizes, vocab_size in ranks.layouts(vocab):
                    mine = ranks.cut(x.detach(), sizes, 1).requires_grad_()
                    layout = {"shard_sizes": sizes, "vocab_size": vocab_size}
                    actual = distributed.token_logprobs(mine, wanted, **layout, **options)
                    assert_same(actual, expected)
                    assert not actual.top_logprobs.requires_grad
                    (share,) = torch.autograd.grad(actual.logprob, mine, weight)
                    assert_gradient(share, share_of(ranks, grad, sizes, 1), x, **options)
    check_bytes(ranks)
    check_other_shapes(ranks)


def check_bytes(ranks: Ranks) -> None:
    """One all-gather and one all-reduce, of what the docstring says."""
    sent = []
    all_reduce, all_gather = dist.all_reduce, collectives._all_gather

    def counted_reduce(tensor, **options):
        sent.append(tensor.nbytes)
        return all_reduce(tensor, **options)

    def counted_gather(output, payload, **options):
        sent.append(payload.nbytes - 8)  # on the CPU: the header
        return all_gather(output, payload, **options)

    dist.all_reduce, collectives._all_gather = counted_reduce, counted_gather
    try:
        mine, ids = ranks.randn(5, 40).requires_grad_(), torch.arange(15).view(5, 3)
        for top_n, of_row in ((0, 8), (6, 4 + 12 * 6)):
            found = distributed.token_logprobs(mine, ids, top_n=top_n)
            assert sent == [5 * of_row + 15 * 4, 15 * 8]
            found.logprob.sum().backward()
            assert len(sent) == 2
            sent.clear()
    finally:
        dist.all_reduce, collectives._all_gather = all_reduce, all_gather


def check_other_shapes(ranks: Ranks) -> None:
    vocab = 50
    logits = ranks.randn(2, 3, vocab)
    sizes = [vocab // ranks.num_ranks + 1] * ranks.num_ranks
    layout = {"shard_sizes": sizes, "vocab_size": vocab}
    mask = torch.full((2, 3, 2), 0x0F0F0F0F, dtype=torch.int32)
    for whole, ids, allowed in (
        (logits, torch.arange(6).view(2, 3), mask),
        (logits, torch.arange(24).view(2, 3, 4), mask[0, 0]),
        (logits[0, 0], torch.tensor(7), mask[0, 0]),
        (logits[0, 0], torch.tensor([7, 8]), None),
        (logits[:0], torch.empty(0, 3, 2).long(), mask[:0]),
    ):
        actual = distributed.token_logprobs(
            ranks.cut(whole, sizes, -1), ids, top_n=2, allowed=allowed, **layout
        )
        expected = dmax_kernels.token_logprobs(whole, ids, top_n=2, allowed=allowed)
        assert [each.shape for each in actual] == [each.shape for each in expected]
        assert_same(actual, expected)
    mine = ranks.cut(logits, sizes, -1)
    for ids, options, error, message in (
        (torch.full((2, 3), 50), {}, ValueError, r"ids must be -100 .* \[0, 50\), got 50 at pos"),
        (torch.zeros(2).long(), {}, RuntimeError, "ids must have shape"),
        (torch.zeros(2, 3), {}, RuntimeError, "ids must be int64 or int32"),
        (torch.zeros(2, 3).long(), {"top_n": 21}, RuntimeError, r"top_n must be in 0\.\.20"),
        (torch.zeros(2, 3).long(), {"temperature": 0.0}, RuntimeError, "temperature must be"),
        (torch.zeros(2, 3).long(), {"suppress_tokens": (50,)}, ValueError, "suppress_tokens must"),
        (torch.zeros(2, 3).long(), {"allowed": mask[..., :1]}, ValueError, "allowed must be int32"),
        (torch.zeros(2, 3).long(), {"allowed": mask[0]}, RuntimeError, "allowed must have shape"),
    ):
        with pytest.raises(error, match=f"^token_logprobs: {message}"):
            distributed.token_logprobs(mine, ids, **options, **layout)


def check_linear_token_logprobs(ranks: Ranks) -> None:
    """Small integers, whose products and sums are exact in float32, with many ties."""
    vocab, dim, rows = 501, 12, 10

    def integers(*shape):
        return torch.randint(-3, 4, shape, generator=ranks.generator)

    few_rows = 4 * vocab * 3  # bytes of logits: blocks of at most three rows
    ids = torch.randint(0, vocab, (rows, 4), generator=ranks.generator)
    ids[3], ids[5, 1] = -100, -100
    upstream = ranks.randn(rows)
    masks = random_masks(ranks, rows, vocab)
    block_bytes = linear._BLOCK_BYTES, logprob_parts.BLOCK_BYTES
    for dtype, (bytes_, options) in itertools.product(
        (torch.float32, torch.bfloat16),
        zip((few_rows, block_bytes[0], few_rows), ({"top_n": 5}, *masks), strict=True),
    ):
        leaves = [x.to(dtype).requires_grad_() for x in (
            integers(rows, dim), integers(vocab, dim), integers(vocab)
        )]  # fmt: skip
        options = {"temperature": 5.0, **options}

        def found(of, hidden, weight, bias, ids, options=options, **layout):
            return of.linear_token_logprobs(hidden, weight, ids, bias, **options, **layout)

        expected = found(dmax_kernels, *leaves, ids)
        one = found(dmax_kernels, *leaves, ids[:, 0])
        grads = torch.autograd.grad(one.logprob, leaves, upstream)
        for sizes, vocab_size in ranks.layouts(vocab):
            layout = {"shard_sizes": sizes, "vocab_size": vocab_size}
            head = (ranks.cut(x.detach(), sizes, 0) for x in leaves[1:])
            mine = [x.requires_grad_() for x in (leaves[0].detach().clone(), *head)]
            linear._BLOCK_BYTES, logprob_parts.BLOCK_BYTES = bytes_, few_rows // 3
            try:
                several = found(distributed, *mine, ids, **layout)
                single = found(distributed, *mine, ids[:, 0], **layout)
            finally:
                linear._BLOCK_BYTES, logprob_parts.BLOCK_BYTES = block_bytes
            assert_same(several, expected)
            assert_same(single, one)
            with pytest.raises(RuntimeError, match="has a gradient for one id per row only"):
                several.logprob.sum().backward()
            actual = torch.autograd.grad(single.logprob, mine, upstream)
            shares = [grads[0], *(share_of(ranks, grad, sizes, 0) for grad in grads[1:])]
            for g, e in zip(actual, shares, strict=True):
                assert g.dtype == dtype
                scale = e.nan_to_num().float().abs().amax().item() if e.numel() else 0.0
                # The gradient of the logits is rounded to the dtype before the products
                close = 2 * ROUNDING[dtype] + 1e-5
                assert_close(g, e, close, close * scale)
    for each in (leaves[0][:0], leaves[0].detach()[None, :0]):
        empty = found(distributed, each, *mine[1:], ids[:0].view(*each.shape[:-1], 4), {}, **layout)
        assert empty.rank.shape == (*each.shape[:-1], 4)
