"""What a vocabulary shard contributes to probabilities and ranks, and the merge over ranks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dmax_kernels.distributed.collectives import gather, sum_over_ranks
from dmax_kernels.distributed.layout import VocabShard, at_least_one_column
from dmax_kernels.ops._logprob_blocks import BLOCK_BYTES
from dmax_kernels.vocabulary import allowed_tokens, shard_mask


class Wanted(NamedTuple):
    """What is asked of flattened rows, the same on every rank."""

    op: str
    shard: VocabShard
    ids: Tensor  # int64 [rows, n], of the whole vocabulary
    shape: torch.Size  # of the ids as they were given
    allowed: Tensor | None  # int32 [rows or 1, words], of the whole vocabulary
    temperature: float
    top_n: int
    ignore_index: int

    @classmethod
    def of(
        cls, op: str, shard: VocabShard, ids: Tensor, row_dims: int, allowed: Tensor | None, *,
        temperature: float, top_n: int, ignore_index: int,
    ) -> Wanted:  # fmt: skip
        """``row_dims`` dimensions have the logits, or the hidden states."""
        several = ids.dim() == row_dims
        flat = ids.long().reshape(-1, ids.shape[-1]) if several else ids.long().reshape(-1, 1)
        if allowed is not None:
            allowed = allowed.reshape(-1, allowed.shape[-1])
        wanted = cls(op, shard, flat, ids.shape, allowed, float(temperature), top_n, ignore_index)
        outside = wanted.used & ~wanted.known
        if ids.device.type == "cpu" and outside.any():
            place = int(outside.flatten().nonzero()[0])
            raise ValueError(
                f"{op}: ids must be {ignore_index} (ignore_index) or token ids in "
                f"[0, {shard.vocab_size}), got {int(flat.flatten()[place])} at position {place}"
            )
        return wanted

    @property
    def used(self) -> Tensor:
        return self.ids != self.ignore_index

    @property
    def known(self) -> Tensor:
        """What is a token's id; on a GPU there may be others."""
        return self.used & (self.ids >= 0) & (self.ids < self.shard.vocab_size)

    def rows(self, span: slice) -> Wanted:
        allowed = self.allowed
        if allowed is not None and len(allowed) > 1:
            allowed = allowed[span]
        return self._replace(ids=self.ids[span], allowed=allowed)

    def mask(self, width: int) -> Tensor | None:
        """The bits of ``width`` columns of this rank's shard."""
        return None if self.allowed is None else shard_mask(self.allowed, self.shard.start, width)

    def hide(self, values: Tensor) -> Tensor:
        """[rows, columns] with 0 in the place of gradients of what the mask leaves out."""
        if self.allowed is None:
            return values
        tokens = allowed_tokens(self.mask(values.shape[1]), values.shape[1])
        return values.masked_fill_(~tokens, 0.0)


class Found(NamedTuple):
    """The results of rows, and what their gradient needs."""

    logprob: Tensor  # [rows, n]
    rank: Tensor
    top_ids: Tensor  # [rows, top_n]
    top_logprobs: Tensor
    best: Tensor  # float32 [rows]: the largest logit
    log_sum: Tensor  # float64: log of the denominator relative to it; NaN without a softmax


def over_ranks(logits: Tensor, wanted: Wanted, dtype: torch.dtype) -> Found:
    """From this rank's columns [rows, n]; ``dtype`` is the sharded tensor's."""
    op, shard, ids, temperature = wanted.op, wanted.shard, wanted.ids, wanted.temperature
    columns, place, top_n = at_least_one_column(logits), ids - shard.start, wanted.top_n
    here = wanted.known & (place >= 0) & (place < shard.width)
    place = torch.where(here, place, 0)
    mask = wanted.mask(columns.shape[1])
    widest = max(top_n, 1)
    _, own_rank, top, top_logprobs, _ = torch.ops.dmax.token_logprobs(
        columns, torch.where(here, place, -1), temperature=temperature,
        top_n=min(widest, columns.shape[1]), ignore_index=-1, allowed=mask,
    )  # fmt: skip
    fields = [
        -top_logprobs[:, 0],
        torch.where(here, values_at(columns, mask, place), 0.0),
        widened(values_at(columns, mask, top), widest),
    ]
    if top_n:
        fields.append(widened(top + shard.start, widest))
    log_sums, values, tops, *top_ids = gather(op, shard, dtype, tuple(fields))

    best, _, log_sum = masses(tops[:, :, 0], log_sums, temperature)

    def logprob_of(x: Tensor) -> Tensor:
        depth = x.double() - best.unsqueeze(1)
        return depth / temperature - log_sum.unsqueeze(1)

    # One rank's value and zeros, added as bits: NaN and -0 stay what they are
    value = values.view(torch.int32).sum(dim=0, dtype=torch.int32).view(torch.float32)
    logprob = logprob_of(value).masked_fill(~wanted.known, torch.nan)
    before = _count_before(logits, wanted, here, value)
    rank = sum_over_ranks(shard, torch.where(here, own_rank, before))
    chosen_ids, chosen = merged(shard, tops, top_ids[0], top_n) if top_n else (ids[:, :0],) * 2
    return Found(
        logprob.masked_fill(~wanted.used, 0.0).float(),
        rank.masked_fill(~wanted.known, -1),
        chosen_ids,
        logprob_of(chosen).float(),
        best,
        log_sum,
    )


def masses(
    maxima: Tensor, log_sums: Tensor, temperature: float | Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """From every shard's largest logit and log of its denominator relative to it, [ranks, rows]:
    the largest of all [rows], and relative to it, in float64, the logs of the shards' denominators
    [ranks, rows] and of the whole one [rows], which is NaN where there is no softmax."""
    best = maxima.amax(dim=0)
    of_shards = (maxima.double() - best) / temperature + log_sums
    # A shard of nothing but -inf has no mass; NaN and +inf spread to the row
    of_shards = of_shards.masked_fill(maxima == -torch.inf, -torch.inf)
    whole = of_shards.logsumexp(dim=0).masked_fill(~best.isfinite(), torch.nan)
    return best, of_shards, whole


def values_at(columns: Tensor, mask: Tensor | None, places: Tensor) -> Tensor:
    """The logits at [rows, n] places, float32; -inf where the mask does not allow them."""
    values = columns.gather(1, places).float()
    if mask is None:
        return values
    words = mask.expand(len(columns), -1).gather(1, places // 32)
    return values.masked_fill((words >> places % 32) & 1 == 0, -torch.inf)


def widened(lists: Tensor, width: int) -> Tensor:
    """A shard may have fewer tokens than are asked for; all ranks send the same number."""
    return torch.nn.functional.pad(lists, (0, width - lists.shape[1]))


def merged(shard: VocabShard, tops: Tensor, top_ids: Tensor, top_n: int) -> tuple[Tensor, Tensor]:
    """The first ``top_n`` ids of all, and their logits, from every rank's: [ranks, rows, top_n]."""
    widths = [min(top_n, shard.width_of(rank)) for rank in range(shard.num_ranks)]
    values, ids = (
        torch.cat([part[:, :width] for part, width in zip(parts, widths, strict=True)], dim=1)
        for parts in (tops, top_ids)
    )
    # They stand in the order of their shards, so that equal ones are in the order of their ids
    _, _, places, _, _ = torch.ops.dmax.token_logprobs(
        values, ids.new_zeros(len(ids), 1), top_n=top_n
    )
    return ids.gather(1, places), values.gather(1, places)


def _count_before(logits: Tensor, wanted: Wanted, here: Tensor, value: Tensor) -> Tensor:
    """[rows, n]: of this rank's tokens, how many come before ids of other shards.

    Each such id becomes a column with its ``value``, in front of the shard's columns or behind
    them as its own shard is, and the op says what rank it has: with the shard's columns between,
    and without.
    """
    lower = wanted.known & ~here & (wanted.ids < wanted.shard.start)
    higher = wanted.known & ~here & ~lower
    value = value.to(logits.dtype)  # which it has had before
    front, back = (value.masked_fill(~side, -torch.inf) for side in (lower, higher))
    column = torch.arange(value.shape[1], device=value.device)

    def ranks(span: slice, *between: Tensor) -> Tensor:
        row = torch.cat([front[span], *between, back[span]], dim=1)
        place = torch.where(lower[span], column, row.shape[1] - len(column) + column)
        place = torch.where((lower | higher)[span], place, -1)
        return torch.ops.dmax.token_logprobs(row, place, ignore_index=-1)[1]

    width = logits.shape[1]
    before = torch.zeros_like(wanted.ids)
    alone = ranks(slice(None))
    step = max(1, BLOCK_BYTES // (4 * max(width, 1)))
    for begin in range(0, len(logits) if width else 0, step):
        span = slice(begin, begin + step)
        shown, mask = logits[span], wanted.rows(span).mask(width)
        if mask is not None:
            shown = shown.masked_fill(~allowed_tokens(mask, width), -torch.inf)
        before[span] = ranks(span, shown) - alone[span]
    return before
