"""Statistics of every row, and its k most likely tokens, over a sharded vocabulary."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from dmax_kernels import ops
from dmax_kernels.distributed.collectives import gather
from dmax_kernels.distributed.layout import VocabShard, at_least_one_column
from dmax_kernels.distributed.logprob_parts import masses, merged, values_at, widened
from dmax_kernels.distributed.visible_tokens import read_masked_logits
from dmax_kernels.ops._temperature import read_temperature
from dmax_kernels.ops.statistics import RowStatistics
from dmax_kernels.vocabulary import shard_mask


def row_statistics(
    logits: Tensor,
    *,
    group: ProcessGroup | None = None,
    shard_sizes: Sequence[int] | None = None,
    vocab_size: int | None = None,
    temperature: float | Tensor = 1.0,
    suppress_token: int = -1,
    suppress_tokens: Sequence[int] = (),
    allowed: Tensor | None = None,
) -> RowStatistics:
    """:func:`dmax_kernels.row_statistics` of the whole vocabulary.

    The unsharded op on each rank's columns, and one all-gather of 24 bytes per row: each shard's
    largest logit and its token, with the shard's confidence, runner-up and entropy. Where shard s
    has the share w_s of the softmax's denominator and the entropy H_s, the whole entropy is
    ``sum_s w_s (H_s - log w_s)``. The merge is in float64.

    Args:
        logits: this rank's columns [..., V_shard], or a DTensor sharded on its last dimension.
        group, shard_sizes, vocab_size: see :mod:`dmax_kernels.distributed`.
        temperature: as in the unsharded op, one or a tensor per row, the same on every rank.
        suppress_token, suppress_tokens, allowed: as in the unsharded op, of the whole vocabulary.

    Returns:
        As the unsharded op, the same on every rank: token exactly, the others within its bounds.
        They carry no gradient.

    Raises:
        ValueError: shards that do not fit together, a suppressed token out of range.
        RuntimeError: as the unsharded op.
    """
    op = "row_statistics"
    mine, shard, allowed = read_masked_logits(
        op, logits, group, shard_sizes, vocab_size, suppress_token, suppress_tokens, allowed
    )
    if shard.num_ranks == 1:
        return ops.row_statistics(mine, temperature=temperature, allowed=allowed)
    number, temperatures = read_temperature(mine, temperature)
    options = {"temperature": number, "temperatures": temperatures}
    # The unsharded op's checks, of logits that take no memory
    torch.ops.dmax._check_row_statistics(_whole(mine, shard), **options, allowed=allowed)
    rows, mask = _rows_and_mask(mine, shard, allowed)
    if temperatures is not None:
        options["temperatures"] = temperatures.reshape(-1)
    place, *shares, _ = torch.ops.dmax.row_statistics(rows, **options, allowed=mask)
    maximum = values_at(rows, mask, place.unsqueeze(1)).squeeze(1)
    fields = gather(op, shard, logits.dtype, (maximum, place + shard.start, *shares))
    found = merge_statistics(*fields, number if temperatures is None else options["temperatures"])
    return RowStatistics(*(each.view(mine.shape[:-1]) for each in found))


def merge_statistics(
    maxima: Tensor,
    tokens: Tensor,
    confidences: Tensor,
    runners_up: Tensor,
    entropies: Tensor,
    temperature: float | Tensor,
) -> RowStatistics:
    """The rows' statistics from those of every shard, [ranks, rows] each, and its largest logits.

    temperature: a number, or float32 [rows].
    """
    in_range = None
    if isinstance(temperature, Tensor):  # on the CPU they have been checked
        in_range = (temperature >= 1e-30) & (temperature <= 1e30)  # as float32, like the op
        temperature = temperature.double()
    confidences = confidences.double()
    best, log_masses, log_sum = masses(maxima, -confidences.log(), temperature)
    # The first of equal ones, and of NaNs: shards stand in the order of their ids
    winner = maxima.argmax(dim=0, keepdim=True)
    token = tokens.gather(0, winner).squeeze(0)
    confidence = (-log_sum).exp()
    # Beside the winner's token stand its own shard's second one and the other shards' first ones.
    # Relative to the winner, a tie is exactly 1
    others = ((maxima.double() - best) / temperature).exp()
    second = (runners_up / confidences).gather(0, winner)
    runner_up = confidence * others.scatter(0, winner, second).amax(dim=0)
    # Neither term is negative, so that nothing cancels where a row is sure
    log_shares = log_masses - log_sum
    entropy = log_shares.exp() * (entropies - log_shares)
    entropy = entropy.masked_fill(maxima == -torch.inf, 0.0).sum(dim=0)
    entropy = entropy.masked_fill(~best.isfinite(), torch.nan)
    logsumexp = torch.where(best.isfinite(), best.double() / temperature + log_sum, best)
    values = [confidence, runner_up, entropy, logsumexp]
    if in_range is not None:
        token = torch.where(in_range, token, 0)
        values = [torch.where(in_range, each, torch.nan) for each in values]
    return RowStatistics(token, *(each.float() for each in values))


def topk_confidence(
    logits: Tensor,
    k: int,
    *,
    group: ProcessGroup | None = None,
    shard_sizes: Sequence[int] | None = None,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    suppress_token: int = -1,
    suppress_tokens: Sequence[int] = (),
    allowed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`dmax_kernels.topk_confidence` of the whole vocabulary, for top-k hybrid embeddings.

    The unsharded op on each rank's columns, and one all-gather of 4 + 12 k bytes per row: each
    shard's k first tokens, their logits, and the confidence of the first of them within the shard.

    Args:
        logits: this rank's columns [..., V_shard], or a DTensor sharded on its last dimension.
        k: 1..8, at most V; shards may have fewer ids.
        group, shard_sizes, vocab_size: see :mod:`dmax_kernels.distributed`.
        temperature, suppress_token, suppress_tokens, allowed: as in the unsharded op, of the whole
            vocabulary, the same on every rank.

    Returns:
        tokens int64 [..., k] and confidences float32 [..., k], the same on every rank: tokens
        exactly those of the unsharded op, confidences to rounding. They carry no gradient.

    Raises:
        ValueError: shards that do not fit together, a suppressed token out of range.
        RuntimeError: as the unsharded op.
    """
    op = "topk_confidence"
    mine, shard, allowed = read_masked_logits(
        op, logits, group, shard_sizes, vocab_size, suppress_token, suppress_tokens, allowed
    )
    if shard.num_ranks == 1:
        return ops.topk_confidence(mine, k, temperature=temperature, allowed=allowed)
    torch.ops.dmax._check_topk_confidence(
        _whole(mine, shard), k, temperature=temperature, allowed=allowed
    )
    rows, mask = _rows_and_mask(mine, shard, allowed)
    places, shares = torch.ops.dmax.topk_confidence(
        rows, min(k, rows.shape[1]), temperature=temperature, allowed=mask
    )
    fields = (
        shares[:, 0],
        widened(values_at(rows, mask, places), k),
        widened(places + shard.start, k),
    )
    first, values, tokens = gather(op, shard, logits.dtype, fields)
    best, _, log_sum = masses(values[:, :, 0], -first.double().log(), temperature)
    tokens, values = merged(shard, values, tokens, k)
    depth = (values.double() - best.unsqueeze(1)) / temperature
    confidences = (depth - log_sum.unsqueeze(1)).exp().float()
    shape = (*mine.shape[:-1], k)
    return tokens.view(shape), confidences.view(shape)


def _whole(logits: Tensor, shard: VocabShard) -> Tensor:
    return logits.new_zeros(()).expand(*logits.shape[:-1], shard.vocab_size)


def _rows_and_mask(
    logits: Tensor, shard: VocabShard, allowed: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """This rank's columns [rows, n], n >= 1, and their bits of the mask [rows or 1, words]."""
    rows = logits.reshape(math.prod(logits.shape[:-1]), shard.width)
    rows = at_least_one_column(rows)
    if allowed is None:
        return rows, None
    allowed = allowed.reshape(-1, allowed.shape[-1])
    return rows, shard_mask(allowed, shard.start, rows.shape[1])
