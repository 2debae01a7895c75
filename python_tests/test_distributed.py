"""dmax_kernels.distributed: equal to the unsharded ops, over 1, 2 and 3 ranks."""

import distributed_process
import pytest
import torch
import torch.multiprocessing

import dmax_kernels
from dmax_kernels import distributed
from dmax_kernels.distributed.statistics import merge_statistics


# Two ranks; three, where shares are uneven and one is in the middle. Every check in one start of
# the processes, which is most of the time; the page in docs/ too
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ranks(num_ranks, tmp_path):
    torch.multiprocessing.spawn(
        distributed_process.main, (num_ranks, str(tmp_path / "rendezvous")), nprocs=num_ranks
    )


LOGITS = torch.randn(6, 50, generator=torch.manual_seed(0))
SEED = torch.tensor([1, 2])


def test_one_rank_without_a_group_has_the_bits_of_the_plain_ops():
    padded = torch.cat([LOGITS, torch.full((6, 3), torch.nan)], dim=1)
    options = {"temperature": 0.7, "suppress_token": 49}
    for actual, expected in (
        (
            distributed.top1_confidence(padded, vocab_size=50, **options),
            dmax_kernels.top1_confidence(LOGITS, **options),
        ),
        (
            distributed.sample_tokens(padded, SEED, vocab_size=50, **options),
            dmax_kernels.sample_tokens(LOGITS, SEED, **options),
        ),
        (
            distributed.token_logprobs(
                padded, torch.arange(6), vocab_size=50, top_n=3, suppress_tokens=(49,)
            ),
            dmax_kernels.token_logprobs(LOGITS, torch.arange(6), top_n=3, suppress_tokens=(49,)),
        ),
        (
            distributed.row_statistics(padded, vocab_size=50, **options),
            dmax_kernels.row_statistics(LOGITS, **options),
        ),
        (
            distributed.topk_confidence(padded, 5, vocab_size=50, **options),
            dmax_kernels.topk_confidence(LOGITS, 5, **options),
        ),
    ):
        assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))
    target = torch.arange(6)
    leaves = [padded.clone().requires_grad_(), LOGITS.clone().requires_grad_()]
    distributed.oput_loss(leaves[0], None, target, vocab_size=50, reduction="mean").backward()
    dmax_kernels.oput_loss(leaves[1], None, target, reduction="mean").backward()
    assert torch.equal(leaves[0].grad[:, :50], leaves[1].grad)
    assert (leaves[0].grad[:, 50:] == 0).all()


def test_one_rank_of_a_head_and_a_table():
    generator = torch.manual_seed(1)
    hidden, table = torch.randn(6, 8, generator=generator), torch.randn(50, 8, generator=generator)
    expected = dmax_kernels.linear_top1_confidence(hidden, table)
    actual = distributed.linear_top1_confidence(hidden, table)
    assert torch.equal(actual[0], expected[0])
    sampled, *_ = distributed.linear_sample_tokens(hidden, table, SEED)
    assert torch.equal(sampled, dmax_kernels.linear_sample_tokens(hidden, table, SEED)[0])
    ids = torch.arange(12).view(6, 2)
    of_ids = dmax_kernels.linear_token_logprobs(hidden, table, ids, suppress_tokens=(3,), top_n=2)
    found = distributed.linear_token_logprobs(hidden, table, ids, suppress_tokens=(3,), top_n=2)
    assert all(torch.equal(*pair) for pair in zip(found, of_ids, strict=True))
    arguments = (*expected, expected[1] < 0.2, 49)
    assert torch.equal(
        distributed.hybrid_embedding(table, *arguments),
        dmax_kernels.hybrid_embedding(table, *arguments),
    )
    assert torch.equal(
        distributed.soft_embedding(LOGITS, table), dmax_kernels.soft_embedding(LOGITS, table)
    )
    with pytest.raises(ValueError, match=r"embedding must have the logits' shards, \[50\] ids wi"):
        distributed.soft_embedding(LOGITS, table[:49])
    leaf = table.clone().requires_grad_()
    loss, _ = distributed.linear_oput_loss(hidden, None, leaf, expected[0])
    plain = dmax_kernels.oput_loss(hidden @ table.t(), None, expected[0])[0]
    torch.testing.assert_close(loss.detach(), plain, rtol=1e-5, atol=1e-6)
    loss.sum().backward()
    assert leaf.grad.abs().amax() > 0


def test_statistics_at_temperatures_out_of_range():
    """What a GPU gives for such a row, which a CPU refuses before the merge."""
    shards = [dmax_kernels.row_statistics(part) for part in LOGITS.split(25, dim=1)]
    fields = [torch.stack(each) for each in zip(*shards, strict=True)]
    maxima = torch.stack([part.amax(dim=1) for part in LOGITS.split(25, dim=1)])
    temperature = torch.tensor([1.0, 0.0, -1.0, torch.nan, torch.inf, 1e30])
    found = merge_statistics(maxima, *fields[:4], temperature)
    assert found.token[1:5].tolist() == [0] * 4
    for values in found[1:]:
        assert values.isnan().tolist() == [False, True, True, True, True, False]
    assert torch.equal(found.token[[0, 5]], fields[0].gather(0, maxima.argmax(0)[None])[0, [0, 5]])


def test_errors_of_one_rank():
    with pytest.raises(ValueError, match=r"shard_sizes must be 1 widths, .* got \[25, 25\]"):
        distributed.top1_confidence(LOGITS, shard_sizes=[25, 25])
    with pytest.raises(
        ValueError, match="group must be None before torch.distributed.init_process_group"
    ):
        distributed.top1_confidence(LOGITS, group=object())
    with pytest.raises(ValueError, match="vocabulary dimension, got a 0-D tensor"):
        distributed.top1_confidence(torch.tensor(1.0))
    with pytest.raises(ValueError, match="weight must have hidden's dtype, torch.float32"):
        distributed.linear_top1_confidence(torch.ones(2, 4), torch.ones(3, 4).half())
    with pytest.raises(ValueError, match="logits must be float32, bfloat16 or float16, got .*64"):
        distributed.top1_confidence(LOGITS.double())
    assert distributed.gather_shard_sizes(LOGITS) == (50,)
    assert distributed.gather_shard_sizes(LOGITS, dim=0) == (6,)
