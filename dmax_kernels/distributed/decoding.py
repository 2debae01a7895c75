"""Top-1, confidence and samples over a sharded vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from dmax_kernels import ops
from dmax_kernels.distributed.collectives import check_layout, gather, gather_logits
from dmax_kernels.distributed.filters import sample_filtered
from dmax_kernels.distributed.layout import (
    VocabShard,
    at_least_one_column,
    check_suppress_token,
    read_shard,
    visible,
)
from dmax_kernels.distributed.linear import Columns, ShardedHead, read_head
from dmax_kernels.distributed.visible_tokens import read_visible
from dmax_kernels.ops.sample import DRAW_TILE, Sample, row_options
from dmax_kernels.vocabulary import allowed_tokens, visible_tokens


def top1_confidence(
    logits: Tensor,
    *,
    group: ProcessGroup | None = None,
    shard_sizes: Sequence[int] | None = None,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    suppress_token: int = -1,
    suppress_tokens: Sequence[int] = (),
    allowed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`dmax_kernels.top1_confidence` of the whole vocabulary (Algorithm 1, line 4).

    Each rank's :func:`dmax_kernels.top1_partial`, one all-gather of 16 bytes per row, and
    :func:`dmax_kernels.top1_merge`: ids exactly those of the unsharded op, confidences to rounding.

    Args:
        logits: this rank's columns [..., V_shard], or a DTensor sharded on its last dimension.
        group, shard_sizes, vocab_size: see :mod:`dmax_kernels.distributed`.
        temperature, suppress_token, suppress_tokens, allowed: as in the unsharded op, of the whole
            vocabulary, the same on every rank.

    Returns:
        token int64 [...] and confidence float32 [...], the same on every rank.

    Raises:
        ValueError: shards that do not fit together. RuntimeError: as the unsharded op.
    """
    op = "top1_confidence"
    logits, shard = read_shard(op, "logits", logits, -1, group, shard_sizes, vocab_size)
    which = read_visible(op, shard, logits.device, suppress_token, suppress_tokens, allowed)
    mine = visible(logits, shard, -1)
    if shard.num_ranks == 1:
        return ops.top1_confidence(mine, temperature=temperature, **which._asdict())
    fields = which.partial(at_least_one_column(mine), shard.start, temperature)
    return ops.top1_merge(*gather(op, shard, logits.dtype, fields), temperature=temperature)


class _Draw(NamedTuple):
    """The options of a draw over shards."""

    filters: dict[str, Any]  # temperature, top_k, top_p and min_p
    suppress_token: int
    allowed: Tensor | None

    @property
    def has_filters(self) -> bool:
        """Whether a rank needs to know the other shards before it draws. Options per row count as
        filters: the partial op has one temperature."""
        if self.greedy:
            return False
        numbers = not any(isinstance(option, Tensor) for option in self.filters.values())
        off = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
        return not numbers or any(self.filters[name] != value for name, value in off.items())

    def is_partial(self, op: str, shard: VocabShard, sharded: Tensor) -> bool:
        """Whether every rank draws from its shard: where all tiles are whole, or none is needed."""
        check_layout(op, shard, sharded)
        starts = (sum(shard.sizes[:rank]) for rank in range(shard.num_ranks))
        return self.greedy or all(start % DRAW_TILE == 0 for start in starts)

    def filtered(self, op: str, logits: Tensor, seed: Tensor, shard: VocabShard) -> Sample:
        """A draw with filters, or with options per row, from every rank's columns."""
        # The unsharded op's checks, of logits that take no memory
        whole = logits.new_zeros(()).expand(*logits.shape[:-1], shard.vocab_size)
        torch.ops.dmax._check_sample_tokens(
            whole, seed, **row_options(op, "logits", logits, **self.filters),
            suppress_token=self.suppress_token, allowed=self.allowed,
        )  # fmt: skip
        mine = self.visible(at_least_one_column(logits), shard.start)
        place = self.suppress_token - shard.start
        if self.suppress_token >= 0 and 0 <= place < mine.shape[-1]:
            suppressed = torch.arange(mine.shape[-1], device=mine.device) == place
            mine = mine.masked_fill(suppressed, -torch.inf)
        return sample_filtered(op, shard, mine, seed, **self.filters)

    def visible(self, logits: Tensor, start: int) -> Tensor:
        """The logits of ids from ``start`` on, -inf where the mask does not allow them."""
        if self.allowed is None:
            return logits
        end = start + logits.shape[-1]
        tokens = allowed_tokens(self.allowed, self.allowed.shape[-1] * 32)[..., start:end]
        tokens = torch.nn.functional.pad(tokens, (0, logits.shape[-1] - tokens.shape[-1]))
        return logits.masked_fill(~tokens, -torch.inf)

    @property
    def greedy(self) -> bool:
        temperature = self.filters["temperature"]
        return not isinstance(temperature, Tensor) and temperature == 0

    def partial(self, logits: Tensor, seed: Tensor, start: int) -> tuple[Tensor, ...]:
        if logits.shape[-1] == 0:  # it may begin anywhere, and has no mass
            start -= start % DRAW_TILE
        logits = self.visible(at_least_one_column(logits), start)
        if self.greedy:
            return ops.top1_partial(logits, start, suppress_token=self.suppress_token)
        return ops.sample_partial(
            logits, seed, start, temperature=self.filters["temperature"],
            suppress_token=self.suppress_token,
        )  # fmt: skip

    def merge(self, maximum: Tensor, sum_exp: Tensor, token: Tensor, *sampled: Tensor) -> Sample:
        temperature = self.filters["temperature"]
        if not sampled:  # greedy
            token, confidence = ops.top1_merge(maximum, sum_exp, token)
            return Sample(token, confidence, confidence, confidence)
        _, top1_probability = ops.top1_merge(maximum, sum_exp, token, temperature=temperature)
        token, probability = ops.sample_merge(
            maximum, sum_exp, token, *sampled, temperature=temperature
        )
        # Both are weights over one sum, which cancels
        relative = (probability / top1_probability).minimum(top1_probability)
        return Sample(token, probability, top1_probability, relative)

    def whole(self, op: str, logits: Tensor, seed: Tensor, shard: VocabShard) -> Sample:
        """The unsharded op on the logits of all ranks."""
        return ops.sample_tokens(
            gather_logits(op, shard, logits), seed, **self.filters,
            suppress_token=self.suppress_token, allowed=self.allowed,
        )  # fmt: skip


def _read_draw(
    op: str, shard: VocabShard, device: torch.device, suppress_token: int,
    suppress_tokens: Sequence[int], allowed: Tensor | None, **filters: Any,
) -> _Draw:  # fmt: skip
    check_suppress_token(op, suppress_token, shard)
    _, suppress_token, allowed = visible_tokens(
        op, shard.vocab_size, device, suppress_token, suppress_tokens, allowed
    )
    return _Draw(filters, suppress_token, allowed)


def sample_tokens(
    logits: Tensor,
    seed: Tensor,
    *,
    group: ProcessGroup | None = None,
    shard_sizes: Sequence[int] | None = None,
    vocab_size: int | None = None,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    suppress_token: int = -1,
    suppress_tokens: Sequence[int] = (),
    allowed: Tensor | None = None,
) -> Sample:
    """:func:`dmax_kernels.sample_tokens` of the whole vocabulary (Eq. 3's rollout).

    The noise depends on the tile and the id in the whole vocabulary. The sampled ids are therefore
    exactly those of the unsharded op at the same seed, however the vocabulary is cut.

    Without filters this takes one all-gather of 24 bytes per row. With a number up to 1,024 as
    top_k, every rank sends its k first tokens, 12 bytes each, whatever the other filters are.
    Otherwise top_k and top_p are found by adding up counts and masses: for each of the two, 2 KB
    per row for every eight bits of the logits' dtype, in as many all-reduces.

    All of this holds if every shard begins at a multiple of 64 ids (greedy: wherever it begins).
    Otherwise the ranks gather the logits, and each runs the unsharded op. On the CPU, comparing the
    widths first is one more, small all-gather.

    The masses are added in fixed point, so a cut of top_p is the same however the vocabulary is
    cut. It may lie one token from the unsharded op's where a share equals top_p to rounding, and a
    draw at temperatures per row may differ from it where two tiles' scores lie within 1e-5.

    Args:
        logits: this rank's columns [..., V_shard], or a DTensor sharded on its last dimension.
        seed: as in the unsharded op, the same on every rank.
        group, shard_sizes, vocab_size: see :mod:`dmax_kernels.distributed`.
        temperature, top_k, top_p, min_p: as in the unsharded op, the same on every rank; greedy is
            :func:`top1_confidence` at temperature 1.
        suppress_token, suppress_tokens, allowed: as in the unsharded op, of the whole vocabulary.

    Returns:
        token, probability, top1_probability and relative_confidence [...], the same on every rank.

    Raises:
        ValueError: shards that do not fit together. RuntimeError: as the unsharded op.
    """
    op = "sample_tokens"
    logits, shard = read_shard(op, "logits", logits, -1, group, shard_sizes, vocab_size)
    draw = _read_draw(
        op, shard, logits.device, suppress_token, suppress_tokens, allowed,
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
    )  # fmt: skip
    mine = visible(logits, shard, -1)
    if shard.num_ranks == 1 or not draw.is_partial(op, shard, logits):
        return draw.whole(op, logits, seed, shard)
    if draw.has_filters:
        return draw.filtered(op, mine, seed, shard)
    fields = draw.partial(mine, seed, shard.start)
    return draw.merge(*gather(op, shard, logits.dtype, fields))


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
    suppress_tokens: Sequence[int] = (),
    allowed: Tensor | None = None,
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
        temperature, suppress_token, suppress_tokens, allowed: as in the unsharded op, of the whole
            vocabulary.

    Returns:
        token int64 [...] and confidence float32 [...], the same on every rank.

    Raises:
        ValueError: shards or shapes that do not fit together. RuntimeError: as the unsharded op.
    """
    op = "linear_top1_confidence"
    head = read_head(op, hidden, weight, bias, group, shard_sizes, vocab_size)
    which = read_visible(op, head.shard, hidden.device, suppress_token, suppress_tokens, allowed)
    if head.shard.num_ranks == 1:
        return ops.linear_top1_confidence(
            hidden, head.weight, head.bias, temperature=temperature, **which._asdict()
        )
    fields = _gather_blocks(
        op, head, hidden, lambda logits, start: which.partial(logits, start, temperature)
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
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    suppress_token: int = -1,
    suppress_tokens: Sequence[int] = (),
    allowed: Tensor | None = None,
) -> Sample:
    """:func:`dmax_kernels.linear_sample_tokens` with the LM head's rows sharded.

    It draws the noise of :func:`sample_tokens` and makes the logits as
    :func:`linear_top1_confidence` does. With filters or options per row, all rows' logits of the
    rank's shard exist at a time, in float32; where :func:`sample_tokens` gathers the logits, those
    of the whole vocabulary.

    Args:
        hidden, weight, bias, group, shard_sizes, vocab_size: as in :func:`linear_top1_confidence`.
        seed, temperature, top_k, top_p, min_p, suppress_token, suppress_tokens, allowed: as in
            :func:`sample_tokens`.

    Returns:
        token, probability, top1_probability and relative_confidence [...], the same on every rank.

    Raises:
        ValueError: shards or shapes that do not fit together. RuntimeError: as the unsharded op.
    """
    op = "linear_sample_tokens"
    head = read_head(op, hidden, weight, bias, group, shard_sizes, vocab_size)
    shard = head.shard
    draw = _read_draw(
        op, shard, hidden.device, suppress_token, suppress_tokens, allowed,
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
    )  # fmt: skip
    if shard.num_ranks == 1:
        return ops.linear_sample_tokens(
            hidden, head.weight, seed, head.bias, **draw.filters,
            suppress_token=draw.suppress_token, allowed=draw.allowed,
        )  # fmt: skip
    partial = draw.is_partial(op, shard, head.weight)
    if partial and not draw.has_filters:
        fields = _gather_blocks(
            op, head, hidden, lambda logits, start: draw.partial(logits, seed, start)
        )
        return draw.merge(*fields)
    rows = hidden.reshape(-1, hidden.shape[-1])
    mine = head.logits(rows, Columns(0, shard.width))
    if partial:
        mine = mine.view(*hidden.shape[:-1], shard.width)
        return draw.filtered(op, mine, seed, shard)
    mine = torch.nn.functional.pad(mine, (0, shard.sizes[shard.rank] - shard.width))
    return draw.whole(op, mine.view(*hidden.shape[:-1], -1), seed, shard)
