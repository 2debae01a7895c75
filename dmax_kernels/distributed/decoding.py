"""Top-1, confidence and samples over a sharded vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from dmax_kernels import ops
from dmax_kernels.distributed.collectives import gather
from dmax_kernels.distributed.layout import (
    at_least_one_column,
    check_suppress_token,
    read_shard,
    visible,
)
from dmax_kernels.distributed.linear import ShardedHead, read_head


def top1_confidence(
    logits: Tensor,
    *,
    group: ProcessGroup | None = None,
    shard_sizes: Sequence[int] | None = None,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    suppress_token: int = -1,
) -> tuple[Tensor, Tensor]:
    """:func:`dmax_kernels.top1_confidence` of the whole vocabulary (Algorithm 1, line 4).

    Each rank's :func:`dmax_kernels.top1_partial`, one all-gather of 16 bytes per row, and
    :func:`dmax_kernels.top1_merge`: ids exactly those of the unsharded op, confidences to rounding.

    Args:
        logits: this rank's columns [..., V_shard], or a DTensor sharded on its last dimension.
        group, shard_sizes, vocab_size: see :mod:`dmax_kernels.distributed`.
        temperature, suppress_token: as in the unsharded op; the token is an id of the whole
            vocabulary.

    Returns:
        token int64 [...] and confidence float32 [...], the same on every rank.

    Raises:
        ValueError: shards that do not fit together. RuntimeError: as the unsharded op.
    """
    op = "top1_confidence"
    options = {"temperature": temperature, "suppress_token": suppress_token}
    logits, shard = read_shard(op, "logits", logits, -1, group, shard_sizes, vocab_size)
    check_suppress_token(op, suppress_token, shard)
    mine = visible(logits, shard, -1)
    if shard.num_ranks == 1:
        return ops.top1_confidence(mine, **options)
    fields = ops.top1_partial(at_least_one_column(mine), shard.start, **options)
    return ops.top1_merge(*gather(op, shard, logits.dtype, fields), temperature=temperature)


def sample_tokens(
    logits: Tensor,
    seed: Tensor,
    *,
    group: ProcessGroup | None = None,
    shard_sizes: Sequence[int] | None = None,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    suppress_token: int = -1,
) -> tuple[Tensor, Tensor]:
    """:func:`dmax_kernels.sample_tokens` of the whole vocabulary (Eq. 3's rollout).

    The noise depends on the id in the whole vocabulary. The sampled ids are therefore exactly those
    of the unsharded op at the same seed, however the vocabulary is cut. This takes one all-gather
    of 24 bytes per row.

    Args:
        logits: this rank's columns [..., V_shard], or a DTensor sharded on its last dimension.
        seed: as in the unsharded op, the same on every rank.
        group, shard_sizes, vocab_size: see :mod:`dmax_kernels.distributed`.
        temperature: 0 (greedy: exactly :func:`top1_confidence`) or 1e-30 to 1e30.
        suppress_token: an id of the whole vocabulary; -1 for none.

    Returns:
        token int64 [...] and its probability float32 [...], the same on every rank.

    Raises:
        ValueError: shards that do not fit together. RuntimeError: as the unsharded op.
    """
    op = "sample_tokens"
    options = {"temperature": temperature, "suppress_token": suppress_token}
    logits, shard = read_shard(op, "logits", logits, -1, group, shard_sizes, vocab_size)
    check_suppress_token(op, suppress_token, shard)
    mine = visible(logits, shard, -1)
    if shard.num_ranks == 1:
        return ops.sample_tokens(mine, seed, **options)
    mine = at_least_one_column(mine)
    if temperature == 0:
        fields = ops.top1_partial(mine, shard.start, suppress_token=suppress_token)
        return ops.top1_merge(*gather(op, shard, logits.dtype, fields))
    fields = ops.sample_partial(mine, seed, shard.start, **options)
    return ops.sample_merge(*gather(op, shard, logits.dtype, fields), temperature=temperature)


def _gather_blocks(
    op: str, head: ShardedHead, hidden: Tensor, partial: Callable[..., tuple[Tensor, ...]]
) -> list[Tensor]:
    """partial(logits, vocab_start) of every block of columns on every rank, [ranks x blocks, ...].

    The blocks of one rank merge in the same way as the shards of several ranks.
    """
    rows = hidden.reshape(-1, hidden.shape[-1])
    results = []
    for block in head.blocks(len(rows)):
        logits = head.logits(rows, block).view(*hidden.shape[:-1], block.width)
        results.append(partial(at_least_one_column(logits), head.shard.start + block.begin))
    fields = tuple(torch.stack(column) for column in zip(*results, strict=True))
    return [each.flatten(0, 1) for each in gather(op, head.shard, hidden.dtype, fields)]


def linear_top1_confidence(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    group: ProcessGroup | None = None,
    shard_sizes: Sequence[int] | None = None,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    suppress_token: int = -1,
) -> tuple[Tensor, Tensor]:
    """:func:`dmax_kernels.linear_top1_confidence` with the LM head's rows sharded.

    Logits are float32, and about 64 MB of them exist at a time. The merge is exact, but the matrix
    product has no fixed order of summation: the ids are the unsharded op's unless two logits differ
    by less than the product's rounding error.

    Args:
        hidden: [..., D], the same on every rank.
        weight: this rank's rows [V_shard, D], or a DTensor sharded on dimension 0.
        bias: this rank's [V_shard], or None.
        group, shard_sizes, vocab_size: see :mod:`dmax_kernels.distributed`.
        temperature, suppress_token: as in the unsharded op.

    Returns:
        token int64 [...] and confidence float32 [...], the same on every rank.

    Raises:
        ValueError: shards or shapes that do not fit together. RuntimeError: as the unsharded op.
    """
    op = "linear_top1_confidence"
    options = {"temperature": temperature, "suppress_token": suppress_token}
    head = read_head(op, hidden, weight, bias, group, shard_sizes, vocab_size)
    check_suppress_token(op, suppress_token, head.shard)
    if head.shard.num_ranks == 1:
        return ops.linear_top1_confidence(hidden, head.weight, head.bias, **options)
    fields = _gather_blocks(
        op, head, hidden, lambda logits, start: ops.top1_partial(logits, start, **options)
    )
    return ops.top1_merge(*fields, temperature=temperature)


def linear_sample_tokens(
    hidden: Tensor,
    weight: Tensor,
    seed: Tensor,
    bias: Tensor | None = None,
    *,
    group: ProcessGroup | None = None,
    shard_sizes: Sequence[int] | None = None,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    suppress_token: int = -1,
) -> tuple[Tensor, Tensor]:
    """:func:`dmax_kernels.linear_sample_tokens` with the LM head's rows sharded.

    It draws the noise of :func:`sample_tokens` and makes the logits as
    :func:`linear_top1_confidence` does.

    Args:
        hidden, weight, bias, group, shard_sizes, vocab_size: as in :func:`linear_top1_confidence`.
        seed, temperature, suppress_token: as in :func:`sample_tokens`.

    Returns:
        token int64 [...] and its probability float32 [...], the same on every rank.

    Raises:
        ValueError: shards or shapes that do not fit together. RuntimeError: as the unsharded op.
    """
    op = "linear_sample_tokens"
    head = read_head(op, hidden, weight, bias, group, shard_sizes, vocab_size)
    check_suppress_token(op, suppress_token, head.shard)
    options = {"temperature": temperature, "suppress_token": suppress_token}
    if head.shard.num_ranks == 1:
        return ops.linear_sample_tokens(hidden, head.weight, seed, head.bias, **options)
    if temperature == 0:
        fields = _gather_blocks(
            op,
            head,
            hidden,
            lambda logits, start: ops.top1_partial(logits, start, suppress_token=suppress_token),
        )
        return ops.top1_merge(*fields)
    fields = _gather_blocks(
        op, head, hidden, lambda logits, start: ops.sample_partial(logits, seed, start, **options)
    )
    return ops.sample_merge(*fields, temperature=temperature)
