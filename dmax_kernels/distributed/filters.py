"""top_k, top_p and min_p of a sharded vocabulary: candidates or counts travel, logits do not.

Each filter keeps a prefix of one order: descending logits, equal ones by ascending id. With one
top_k for all rows, up to 1,024, every rank sends its k first tokens in this order, among which are
those that the filters keep. Otherwise the ranks find the last value that is kept, the cut, bit by
bit from the highest on, eight at a time: each round adds up over the ranks how many tokens, or how
much mass, have each of the 256 values of these bits. No step depends on a value that the host
reads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dmax_kernels import ops
from dmax_kernels.distributed.collectives import gather, sum_over_ranks
from dmax_kernels.distributed.layout import VocabShard
from dmax_kernels.ops.sample import DRAW_TILE, Sample

_DIGIT_BITS = 8
_DIGITS = 1 << _DIGIT_BITS
_MOST_CANDIDATES = 1024
_NO_KEY = (1 << 63) - 1
_MOST_LOGITS = 1 << 23  # that are searched at a time, at some 40 bytes each


def sortable_keys(x: Tensor) -> Tensor:
    """int64 from 0 on that ascend as the values descend: 16 bits, or 32 of float32. -0 equals 0."""
    bits = 8 * x.element_size()
    most = (1 << bits - 1) - 1
    words = (x + 0.0).view(torch.int32 if x.dtype == torch.float32 else torch.int16)
    words ^= (words >> bits - 1) & most  # they ascend as the values do, negative ones too
    return words.long().neg_().add_(most)  # in place, since fresh memory takes longer than sums


class _Search:
    """The filters of some rows, [rows, n] of this rank's columns."""

    def __init__(self, op: str, shard: VocabShard, logits: Tensor) -> None:
        self.op, self.shard, self.logits = op, shard, logits
        self.keys = sortable_keys(logits)

    def _gather(self, *fields: Tensor) -> list[Tensor]:
        return gather(self.op, self.shard, self.logits.dtype, fields)

    def prefix(self, amounts: Tensor, target: Tensor) -> Tensor:
        """bool [rows, n]: the shortest prefix of all ranks' tokens whose amounts, int64 [rows, n],
        reach the target [rows, 1], which is from 1 to the sum of all."""
        cut = torch.zeros_like(target)
        for shift in range(8 * self.logits.element_size() - _DIGIT_BITS, -1, -_DIGIT_BITS):
            # Place 0 holds what comes before the values that begin with the bits found, the last
            # place what comes behind them
            place = (self.keys >> shift).sub_(cut >> shift).clamp_(-1, _DIGITS).add_(1)
            sums = amounts.new_zeros(len(amounts), _DIGITS + 2).scatter_add_(1, place, amounts)
            sums = sum_over_ranks(self.shard, sums)
            before = sums.cumsum(dim=-1) - sums
            digit = (before[:, 1:-1] < target).sum(dim=-1, keepdim=True) - 1
            cut += digit << shift
        missing = target - before.gather(-1, digit + 1)
        is_cut = (self.keys == cut) & (amounts > 0)
        # Those equal to the cut have one amount, and the lowest ids of them are kept
        (equal,) = self._gather(is_cut.sum(dim=-1, keepdim=True))
        each = (sums.gather(-1, digit + 1) // equal.sum(dim=0).clamp(min=1)).clamp(min=1)
        own = (missing + each - 1) // each - equal[: self.shard.rank].sum(dim=0)
        return (self.keys < cut) | (is_cut & (is_cut.cumsum(dim=-1, dtype=torch.int32) <= own))

    def kept(
        self, largest: Tensor, temperature: Tensor, top_k: Any, top_p: Any, min_p: Any
    ) -> Tensor:
        """bool [rows, n]; ``largest`` logits and ``temperature`` are [rows, 1], the others that, or
        a number."""
        x = self.logits.float()
        kept = torch.ones_like(x, dtype=torch.bool)
        vocab = self.shard.vocab_size
        if isinstance(top_k, Tensor) or top_k > 0:
            count = torch.as_tensor(top_k, device=x.device).expand_as(largest)
            count = torch.where((count > 0) & (count < vocab), count, vocab).long()
            kept = self.prefix(kept.long(), count)
        if isinstance(top_p, Tensor) or top_p < 1:
            masses = fixed_point_masses(x, largest, temperature, vocab).masked_fill_(~kept, 0)
            total = sum_over_ranks(self.shard, masses.sum(dim=-1, keepdim=True))
            kept = kept & (self.prefix(masses, target_of(top_p, total)) | is_off(top_p))
        return kept & (x >= least_value(largest, temperature, min_p))


def fixed_point_masses(x: Tensor, largest: Tensor, temperature: Tensor, vocab: int) -> Tensor:
    """int64 weights of tokens, of which those of the whole vocabulary do not overflow: neither the
    order of additions nor the cut of the vocabulary shows."""
    unit = 2.0 ** (62 - vocab.bit_length())
    return ((x - largest).div_(temperature.float()).exp_() * unit).long()


def target_of(top_p: Any, total: Tensor) -> Tensor:
    share = torch.as_tensor(top_p, device=total.device).float().double()
    return (share * total).ceil().long().clamp(min=1)


def is_off(top_p: Any) -> Any:
    return top_p >= 1


def least_value(largest: Tensor, temperature: Tensor, min_p: Any) -> Tensor:
    """The smallest float32 that min_p keeps."""
    share = torch.as_tensor(min_p, device=largest.device).float().double()
    least = largest.double() + temperature * share.log()
    rounded = least.float()
    above = torch.nextafter(rounded, torch.full_like(rounded, torch.inf))
    return torch.where(rounded.double() < least, above, rounded)


def kept_candidates(
    op: str, shard: VocabShard, logits: Tensor, largest: Tensor, temperature: Tensor, top_k: int,
    top_p: Any, min_p: Any,
) -> Tensor:  # fmt: skip
    """bool [rows, n] for one top_k for all rows: from the first tokens of every rank."""
    # A key per token: its place in the order of the whole vocabulary
    ids = torch.arange(shard.start, shard.start + logits.shape[-1], device=logits.device)
    keys = sortable_keys(logits).bitwise_left_shift_(31).add_(ids)
    count = min(top_k, logits.shape[-1])
    first = torch.topk(keys, count, largest=False)
    values = logits.gather(-1, first.indices).float()
    # Every rank sends as many, past its last token none
    missing = (len(logits), min(top_k, max(shard.sizes)) - count)
    candidates = (
        torch.cat([first.values, first.values.new_full(missing, _NO_KEY)], dim=-1),
        torch.cat([values, values.new_full(missing, -torch.inf)], dim=-1),
    )
    candidates = gather(op, shard, logits.dtype, candidates)
    of_all, values = (each.movedim(0, 1).flatten(1) for each in candidates)
    of_all, order = torch.sort(of_all, dim=-1)
    of_all, values = of_all[:, :top_k], values.gather(-1, order)[:, :top_k]
    masses = fixed_point_masses(values, largest, temperature, shard.vocab_size)
    before = masses.cumsum(dim=-1) - masses
    target = target_of(top_p, masses.sum(dim=-1, keepdim=True))
    kept = ((before < target) | is_off(top_p)) & (
        values >= least_value(largest, temperature, min_p)
    )
    last = of_all.gather(-1, (kept.sum(dim=-1, keepdim=True) - 1).clamp(min=0))
    chosen = torch.zeros_like(logits, dtype=torch.bool)
    return chosen.scatter_(-1, first.indices, first.values <= last)


def drop_filtered(
    op: str, shard: VocabShard, logits: Tensor, temperature: Any, top_k: Any, top_p: Any, min_p: Any
) -> Tensor:
    """This rank's logits [..., n] with -inf where the filters drop a token: those tokens that they
    drop of the whole vocabulary. No temperature is 0."""
    rows = logits.reshape(-1, logits.shape[-1])
    step = max(1, _MOST_LOGITS // max(shard.sizes))  # the same on every rank
    result = rows.clone()
    if not isinstance(temperature, Tensor):
        temperature = rows.new_full((len(rows),), temperature, dtype=torch.float32)
    temperature = temperature.reshape(-1, 1).double()
    options = [
        option.reshape(-1, 1) if isinstance(option, Tensor) else option
        for option in (top_k, top_p, min_p)
    ]
    (largest,) = gather(op, shard, logits.dtype, (rows.float().amax(dim=-1, keepdim=True),))
    largest = largest.amax(dim=0)  # NaN if there is one
    for begin in range(0, len(rows), step):
        some = slice(begin, begin + step)
        of_rows = [each[some] if isinstance(each, Tensor) else each for each in options]
        of_rows = [largest[some], temperature[some], *of_rows]
        if not isinstance(top_k, Tensor) and 1 <= top_k <= _MOST_CANDIDATES:
            kept = kept_candidates(op, shard, rows[some], *of_rows)
        else:
            kept = _Search(op, shard, rows[some]).kept(*of_rows)
        # A row with a NaN or +inf, or nothing but -inf, is left as it is
        kept |= ~largest[some].isfinite()
        result[some].masked_fill_(~kept, -torch.inf)
    return result.view(logits.shape)


def is_in_range(temperature: Any, top_k: Any, top_p: Any, min_p: Any) -> Any:
    """Which rows' options are: csrc/common/draw_options.h has the same ranges."""
    good = (temperature == 0) | (temperature >= 1e-30) & (temperature <= 1e30)
    good = good & (top_k >= 0) & (top_k == top_k // 1) & (top_p > 0) & (top_p <= 1)
    return good & (min_p >= 0) & (min_p <= 1)


def sample_filtered(
    op: str, shard: VocabShard, logits: Tensor, seed: Tensor, **options: Any
) -> Sample:
    """The sample of this rank's logits [..., n], n >= 1, and those of the other ranks."""
    temperature = options["temperature"]
    if per_row := isinstance(temperature, Tensor):
        # The partial ops have one temperature: the logits are divided by the others before
        temperature = temperature.float()
        divisor = torch.where((temperature > 0) & temperature.isfinite(), temperature, 1.0)
        options["temperature"] = divisor
    kept = drop_filtered(op, shard, logits, **options)
    whole = logits
    if per_row:
        whole, kept = (each.float() / divisor.unsqueeze(-1) for each in (logits, kept))
    number = {} if per_row else {"temperature": temperature}
    start = shard.start - shard.start % DRAW_TILE  # an empty shard may begin anywhere
    fields = ops.top1_partial(whole, start, **number)
    fields = gather(
        op, shard, logits.dtype, (*fields, *ops.sample_partial(kept, seed, start, **number))
    )
    first, top1 = ops.top1_merge(*fields[:3], **number)
    _, top1_of_kept = ops.top1_merge(*fields[3:6], **number)
    token, probability = ops.sample_merge(*fields[3:], **number)
    # Both are weights over what is kept, which cancels
    relative = (probability / top1_of_kept).minimum(top1)
    if per_row:
        greedy = temperature == 0
        token = torch.where(greedy, first, token)
        probability, relative = (torch.where(greedy, top1, x) for x in (probability, relative))
    if any(isinstance(option, Tensor) for option in options.values()):
        # On the CPU they have been checked
        good = is_in_range(**options | {"temperature": temperature})
        token = torch.where(good, token, 0)
        probability, top1, relative = (
            torch.where(good, x, torch.nan) for x in (probability, top1, relative)
        )
    return Sample(token, probability, top1, relative)
