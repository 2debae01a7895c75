"""Which masked positions a step promotes to token positions: one pure function per decoding rule.

Each maps what a forward pass said about a block (`row_statistics` of its logits) and `masked`, all
[..., K], to `promoted`, bool [..., K]. They share four promises:

- only masked positions are promoted, and at least one wherever any is masked (the progress rule);
- rows do not see each other: a row's result is the same alone and in any batch;
- ties go to the leftmost position;
- a position whose statistics are NaN is promoted by the progress rule alone, when nothing better
  is masked: the leftmost of them (by the left-to-right rule, when it stands leftmost).

No function waits for the device. The prefix rule of Soft Parallel Decoding is the op
`dmax_kernels.prefix_promote`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dmax_kernels.reference.sample import MASK32, philox4x32


def threshold_promote(confidence: Tensor, masked: Tensor, threshold: float | Tensor) -> Tensor:
    """Every masked position with c > threshold, wherever it stands; else the most confident one.

    The confidence-aware parallel decoding of Fast-dLLM (arXiv 2505.22618, section 3.3) and the
    default of LLaDA 2.0, with threshold 0.95.
    """
    return or_best(masked & (confidence > threshold), confidence, masked)


def factor_promote(confidence: Tensor, masked: Tensor, factor: float) -> Tensor:
    """The n most confident masked positions, for the largest n with (n + 1)(1 - c_(n)) < factor.

    c_(n) is the n-th largest confidence of the row's masked positions. Parallel and sequential
    greedy decoding agree on n tokens when (n + 1)(1 - c) <= 1 for all of them: the more tokens at
    once, the surer each has to be (Fast-dLLM, arXiv 2505.22618, Theorem 1 and section 3.3).
    """
    # Both factors grow with the rank, so that the first failure is the last word: no prefix scan
    n = rank_within(confidence, masked) + 1
    return or_best(masked & ((n + 1) * (1 - confidence) < factor), confidence, masked)


def hierarchical_promote(
    confidence: Tensor, masked: Tensor, threshold: float | Tensor, low_threshold: float
) -> Tensor:
    """Of each run of masked positions its most confident one, to divide the run and conquer it.

    promoted = (best of its run and c > low_threshold) or c > threshold, and the row's best. Far
    apart, tokens depend on each other less, and each one splits its run in two. dInfer's
    hierarchical decoder (arXiv 2510.08666; low_threshold 0.4 there, 0.2 in DMax's Table 1), which
    promotes every tied best of a run: here the leftmost.
    """
    starts = masked & ~F.pad(masked[..., :-1], (1, 0))
    best_of_run = rank_within(confidence, masked, starts.cumsum(dim=-1)) == 0
    promoted = (best_of_run & (confidence > low_threshold)) | (confidence > threshold)
    return or_best(masked & promoted, confidence, masked)


def top_n_promote(confidence: Tensor, masked: Tensor, tokens_per_step: int) -> Tensor:
    """The `tokens_per_step` most confident masked positions, however sure they are.

    LLaDA's low-confidence remasking with a fixed number of steps (arXiv 2502.09992, section 2.4),
    and the arbitrary order (AO) of arXiv 2602.23225, section 4.2.
    """
    rank = rank_within(confidence, masked)
    return masked & (((rank < tokens_per_step) & ~confidence.isnan()) | (rank == 0))


def autoregressive_promote(confidence: Tensor, masked: Tensor, tokens_per_step: int) -> Tensor:
    """The leftmost `tokens_per_step` masked positions: AR order (arXiv 2602.23225, section 4.2).

    The leftmost is promoted whatever its confidence; the run behind it ends at a NaN.
    """
    place = masked.cumsum(dim=-1) - 1
    passes = (place == 0) | ((place < tokens_per_step) & ~confidence.isnan())
    return masked & ((masked & ~passes).cumsum(dim=-1) == 0)


def random_promote(
    token: Tensor,
    confidence: Tensor,
    step: Tensor,
    masked: Tensor,
    tokens_per_step: int,
    seed: int,
) -> Tensor:
    """`tokens_per_step` masked positions drawn uniformly: the low-ARness control (section 4.2).

    Repeatable: position j draws word 0 of Philox4x32-10 with key `seed` and counter (j, step,
    salt), and the largest draws win. The salt is a checksum of the row's own predictions `token`,
    so that blocks and rows draw differently though no row knows its place in the batch. step: [...]
    """
    position = torch.arange(masked.shape[-1], device=masked.device)
    salt = (token * (2 * position + 1)).sum(dim=-1, keepdim=True)
    words = (position, step.long().unsqueeze(-1), salt & MASK32, (salt >> 32) & MASK32)
    counter = tuple(word.expand_as(masked) for word in words)
    key = (torch.full_like(counter[0], seed & MASK32), torch.full_like(counter[0], seed >> 32))
    draw = (philox4x32(counter, key)[0] >> 8).float()  # 24 bits: exact in float32
    return top_n_promote(draw.masked_fill(confidence.isnan(), torch.nan), masked, tokens_per_step)


def entropy_bound_promote(entropy: Tensor, masked: Tensor, entropy_bound: float) -> Tensor:
    """Masked positions in ascending order of entropy, while the entropies before sum to <= bound.

    With H_(1) <= H_(2) <= ... of the masked positions, the k-th is promoted when
    H_(1) + ... + H_(k-1) <= entropy_bound: the sum bounds how much the tokens taken together can
    depend on each other (EB-sampler, arXiv 2505.24857; the default of DiffusionGemma, with 0.1).
    """
    known = masked & ~entropy.isnan()
    ascending, order = entropy.masked_fill(~known, torch.inf).sort(dim=-1, stable=True)
    before = F.pad(ascending.cumsum(dim=-1)[..., :-1], (1, 0))
    within = torch.zeros_like(masked).scatter(-1, order, before <= entropy_bound)
    return or_best(known & within, -entropy, masked)


def margin_promote(
    confidence: Tensor, runner_up: Tensor, masked: Tensor, threshold: float | Tensor
) -> Tensor:
    """Every masked position whose margin, confidence - runner_up, exceeds the threshold.

    Where none does, the widest margin. The margin tells one clear winner from two close ones, which
    the confidence alone does not (arXiv 2502.06768; the early commits of Prophet, 2508.19982).
    """
    return threshold_promote(confidence - runner_up, masked, threshold)


def uniform_promote(confidence: Tensor, masked: Tensor) -> Tensor:
    """Every masked position at once; what follows is revision alone.

    With hard tokens predicted anew at every position of every step until the block converges, this
    is how DMax decodes its uniform-diffusion baseline (arXiv 2604.08302, Table 1 and section 4.1).
    The block starts fully masked, as there, and not from random tokens.
    """
    return or_best(masked & ~confidence.isnan(), confidence, masked)


def parallel_forced_promote(
    confidence: Tensor,
    masked: Tensor,
    slots: int | Tensor,
    tokens_per_step: int,
    summary: int = -1,
) -> Tensor:
    """The `tokens_per_step` most confident masked positions of every slot: no slot waits.

    NAP's macro-parallel, micro-confidence updates (arXiv 2602.23225, section 5.3): the budget is
    spread over all reasoning slots at every step, and inside a slot confidence decides. The slot
    `summary` waits until no other slot has a masked position. The progress rule holds per slot.

    Args:
        slots: int64 [K] or [..., K], the slot of each position (what a fixed header has is never
            looked at, as it is not masked); or a number m, which cuts K into m equal slots.
        summary: which slot is the summary; -1 for none.
    """
    length = masked.shape[-1]
    if isinstance(slots, int):
        slots = torch.arange(length, device=masked.device) * slots // length
    is_summary = slots == summary
    reasoning = (masked & ~is_summary).any(dim=-1, keepdim=True)
    candidates = masked & ~(is_summary & reasoning)
    rank = rank_within(confidence, candidates, slots)
    return candidates & (((rank < tokens_per_step) & ~confidence.isnan()) | (rank == 0))


def or_best(promoted: Tensor, score: Tensor, masked: Tensor) -> Tensor:
    """`promoted`, or in a row where that is nothing its best masked position: a step must move."""
    key = sort_key(score, masked)
    is_best = key == key.amax(dim=-1, keepdim=True)
    best = masked & is_best & (is_best.cumsum(dim=-1) == 1)
    return torch.where(promoted.any(dim=-1, keepdim=True), promoted, best)


def rank_within(score: Tensor, masked: Tensor, group: Tensor | None = None) -> Tensor:
    """Rank of every masked position by descending score, 0 for the best; in its group if given.

    NaN scores come last of the masked; positions that are not masked rank behind all of these.
    Two stable sorts, by score and then by group: argmax leaves ties open on a GPU.
    """
    order = sort_key(score, masked).argsort(dim=-1, descending=True, stable=True)
    place = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    if group is not None:
        group, by_group = group.expand_as(order).gather(-1, order).sort(dim=-1, stable=True)
        order = order.gather(-1, by_group)
        is_first = F.pad(group[..., 1:] != group[..., :-1], (1, 0), value=True)
        place = place - (place * is_first).cummax(dim=-1).values
    return torch.empty_like(order).scatter_(-1, order, place)


def sort_key(score: Tensor, masked: Tensor) -> Tensor:
    """score with NaN below every number, and positions that are not masked below NaN."""
    lowest = torch.finfo(score.dtype).min
    return score.nan_to_num(nan=lowest, neginf=lowest).masked_fill(~masked, -torch.inf)
