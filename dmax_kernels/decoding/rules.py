"""Decoding rules: which masked positions a step turns into token positions.

`RULES` has them by name. Those that end a block early are in `early_exit.py`, and those that keep
something from step to step in `memory_rules.py`. A class's `promote` is the rule's formula; the
step around it is `step.ComposedRule`. All formulas keep four promises:

- only masked positions are promoted, and at least one wherever any is masked (the progress rule);
- no row reads another one: its result is the same alone and in any batch;
- ties go to the leftmost position;
- a position whose statistics are NaN is promoted by the progress rule alone, when nothing better
  is masked: the leftmost of them (by the left-to-right rule, when it stands leftmost).

No formula waits for the device. Rules without `revise` keep a token once it is decoded, which is
what models trained by plain masked diffusion need.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dmax_kernels._checks import one_of, require
from dmax_kernels.decoding.config import DecodeConfig, RunConfig
from dmax_kernels.decoding.early_exit import Prophet, SchED
from dmax_kernels.decoding.memory_rules import Credit, Edit
from dmax_kernels.decoding.rule_parts import (
    FixedCount,
    above_threshold,
    best_in_turns,
    best_of_groups,
    keep_integer,
    keep_number,
    or_best,
    rank_within,
)
from dmax_kernels.decoding.state import LiveBlocks
from dmax_kernels.decoding.step import ComposedRule, Rule, Seen, check_sampling
from dmax_kernels.reference.sample import MASK32, philox4x32


class SoftParallel(Rule):
    """The paper's rule (Algorithm 1) as one fused step, `spd_step_`."""

    def update_(
        self, logits: Tensor, embedding: Tensor, state: LiveBlocks, config: RunConfig
    ) -> None:
        if config.convergence != "both" or state.sampling:  # the fused step is greedy
            ABLATIONS["spd"].update_(logits, embedding, state, config)
            return
        config.functions.spd_step_(
            logits,
            embedding,
            **state.spd_buffers(),
            mask_token_id=config.mask_token_id,
            tau_dec=config.tau_dec,
            tau_acc=config.tau_acc,
            semantics=config.semantics,
            top_k=config.top_k,
            **state.visible(config),
            thresholds=state.thresholds,
        )


@dataclass(frozen=True)
class Ablation(ComposedRule):
    """Every masked position with c > tau_dec, and the paper's Table 3 by three switches.

    prefix: promote only the leftmost run of confident masked positions. Where none is confident,
        the leftmost is promoted, or without `prefix` the most confident one.
    revise, soft: see `ComposedRule`.

    Without any of them this is the confidence-aware parallel decoding of Fast-dLLM (arXiv
    2505.22618, section 3.3), and the default of LLaDA 2.0 with tau_dec 0.95.
    """

    prefix: bool
    revise: bool
    soft: bool

    def promote(self, seen: Seen) -> Tensor:
        if self.prefix:
            # The function's threshold is one number, and each row has its own tau_dec
            confident = seen.confidence > seen.tau_dec
            return seen.functions.prefix_promote(confident.float(), seen.masked, 0.5)
        return above_threshold(seen)


@dataclass(frozen=True)
class Factor(ComposedRule):
    """The n most confident masked positions, for the largest n with (n + 1)(1 - c_(n)) < factor.

    c_(n) is the n-th largest confidence of the row's masked positions. Parallel and sequential
    greedy decoding agree on n tokens when (n + 1)(1 - c) <= 1 for all of them: the more tokens at
    once, the surer each has to be (Fast-dLLM, arXiv 2505.22618, Theorem 1 and section 3.3). It
    reads no threshold.
    """

    factor: float = 1.0

    def __post_init__(self) -> None:
        keep_number(self, "factor", "positive", lambda value: value > 0)

    def promote(self, seen: Seen) -> Tensor:
        # Both factors grow with the rank: whatever follows a position that fails, fails too
        n = rank_within(seen.confidence, seen.masked) + 1
        passes = (n + 1) * (1 - seen.confidence) < self.factor
        return or_best(seen.masked & passes, seen.confidence, seen.masked)


@dataclass(frozen=True)
class Hierarchical(ComposedRule):
    """The most confident position of each run of masked ones: divide the run and conquer it.

    promoted = (best of its run and c > low_threshold) or c > tau_dec, and the row's best. Tokens
    that are far apart depend less on each other, and each one splits its run in two. This is
    dInfer's hierarchical decoder (arXiv 2510.08666; low_threshold is 0.4 there and 0.2 in DMax's
    Table 1), except that dInfer promotes every tied best of a run, and this rule the leftmost.
    """

    low_threshold: float = 0.2

    def __post_init__(self) -> None:
        keep_number(self, "low_threshold", "in [0, 1]", lambda value: 0 <= value <= 1)

    def promote(self, seen: Seen) -> Tensor:
        masked, c = seen.masked, seen.confidence
        starts = masked & ~F.pad(masked[..., :-1], (1, 0))
        best_of_run = rank_within(c, masked, starts.cumsum(dim=-1)) == 0
        promoted = (best_of_run & (c > self.low_threshold)) | (c > seen.tau_dec)
        return or_best(masked & promoted, c, masked)


@dataclass(frozen=True)
class TopN(FixedCount):
    """The `tokens_per_step` most confident masked positions, however sure they are.

    LLaDA's low-confidence remasking with a fixed number of steps (arXiv 2502.09992, section 2.4),
    and the arbitrary order (AO) of arXiv 2602.23225, section 4.2.
    """

    def promote(self, seen: Seen) -> Tensor:
        return best_of_groups(seen.confidence, seen.masked, self.tokens_per_step)


@dataclass(frozen=True)
class Autoregressive(FixedCount):
    """The leftmost `tokens_per_step` masked positions: AR order (arXiv 2602.23225, section 4.2).

    The leftmost is promoted whatever its confidence; the run after it ends at a NaN.
    """

    def promote(self, seen: Seen) -> Tensor:
        place = seen.masked.cumsum(dim=-1) - 1
        passes = (place == 0) | ((place < self.tokens_per_step) & ~seen.confidence.isnan())
        return seen.masked & ((seen.masked & ~passes).cumsum(dim=-1) == 0)


@dataclass(frozen=True)
class Random(FixedCount):
    """`tokens_per_step` masked positions drawn uniformly: a control of low ARness.

    (arXiv 2602.23225, section 4.2.) The draws repeat: position j draws word 0 of Philox4x32-10 with
    key `seed` and counter (j, step, salt), and the largest draws win. The salt is a checksum of the
    row's own predictions, by which blocks and rows draw differently although no row knows its place
    in the batch.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        keep_integer(self, "seed", "an integer in [0, 2^64)", least=0, below=2**64)

    def promote(self, seen: Seen) -> Tensor:
        masked = seen.masked
        position = torch.arange(masked.shape[-1], device=masked.device)
        salt = (seen.token * (2 * position + 1)).sum(dim=-1, keepdim=True)
        words = (position, seen.step.long().unsqueeze(-1), salt & MASK32, (salt >> 32) & MASK32)
        counter = tuple(word.expand_as(masked) for word in words)
        key = (
            torch.full_like(counter[0], self.seed & MASK32),
            torch.full_like(counter[0], self.seed >> 32),
        )
        draw = (philox4x32(counter, key)[0] >> 8).float()  # 24 bits: exact in float32
        draw = draw.masked_fill(seen.confidence.isnan(), torch.nan)
        return best_of_groups(draw, masked, self.tokens_per_step)


@dataclass(frozen=True)
class EntropyBound(ComposedRule):
    """Masked positions in ascending order of entropy, while the entropies before sum to <= bound.

    With H_(1) <= H_(2) <= ... of the masked positions, the k-th is promoted when
    H_(1) + ... + H_(k-1) <= entropy_bound. The sum bounds how much the tokens taken together can
    depend on each other (EB-sampler, arXiv 2505.24857; the default of DiffusionGemma, with 0.1).
    """

    entropy_bound: float = 0.1
    reads = "row_statistics"

    def __post_init__(self) -> None:
        keep_number(self, "entropy_bound", "at least 0", lambda value: value >= 0)

    def promote(self, seen: Seen) -> Tensor:
        known = seen.masked & ~seen.entropy.isnan()
        ascending, order = seen.entropy.masked_fill(~known, torch.inf).sort(dim=-1, stable=True)
        before = F.pad(ascending.cumsum(dim=-1)[..., :-1], (1, 0))
        within = torch.zeros_like(known).scatter(-1, order, before <= self.entropy_bound)
        return or_best(known & within, -seen.entropy, seen.masked)


@dataclass(frozen=True)
class Margin(ComposedRule):
    """Every masked position whose lead over the runner-up exceeds tau_dec; else the widest lead.

    The lead is the top-1 probability minus the second largest. It tells one clear winner from two
    close ones, which the confidence alone does not (arXiv 2502.06768). `Prophet` reads the same two
    candidates, as a difference of logits over the whole block, and decides when to stop.
    """

    reads = "row_statistics"

    def promote(self, seen: Seen) -> Tensor:
        lead = seen.confidence - seen.runner_up
        return or_best(seen.masked & (lead > seen.tau_dec), lead, seen.masked)


@dataclass(frozen=True)
class Uniform(ComposedRule):
    """Every masked position at once; what follows is revision alone.

    With hard tokens predicted anew at every position of every step until the block converges, this
    is how DMax decodes its uniform-diffusion baseline (arXiv 2604.08302, Table 1 and section 4.1).
    The block starts fully masked, as there, and not from random tokens.
    """

    revise: bool = True

    def promote(self, seen: Seen) -> Tensor:
        return or_best(seen.masked & ~seen.confidence.isnan(), seen.confidence, seen.masked)


@dataclass(frozen=True)
class ParallelForced(FixedCount):
    """`tokens_per_step` masked positions, spread over slots that take turns: no slot waits.

    NAP's macro-parallel, micro-confidence updates (arXiv 2602.23225, section 5.3): the budget of a
    step is spread over all slots (`best_in_turns`), and inside a slot confidence decides. Here the
    slots are equal parts of each block; `extra.nap_generate` decodes the paper's canvas, with
    headers and a summary.
    """

    tokens_per_step: int = 3  # in all: one of each slot
    num_slots: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        keep_integer(self, "num_slots", "a positive integer")

    def promote(self, seen: Seen) -> Tensor:
        length = seen.masked.shape[-1]
        slots = torch.arange(length, device=seen.masked.device) * self.num_slots // length
        slots = torch.where(seen.editable, slots, -1)  # a prompt's tail had no turns
        return best_in_turns(seen.confidence, seen.masked, self.tokens_per_step, slots)


@dataclass(frozen=True)
class LocalLeap(ComposedRule):
    """Every masked position with c > tau_dec, an anchor, and relaxed ones in its neighbourhood.

    Within `radius` positions of an anchor, c > relaxed_threshold is enough. Where there is no
    anchor, the most confident one. What a sure token determines lies close to it, and decays with
    the distance (LocalLeap, arXiv 2510.07081). The defaults are those of its `generate.py` for
    LLaDA-8B, which takes them with a threshold of 0.9, here tau_dec.
    """

    relaxed_threshold: float = 0.75
    radius: int = 4

    def __post_init__(self) -> None:
        keep_number(self, "relaxed_threshold", "in [0, 1]", lambda value: 0 <= value <= 1)
        keep_integer(self, "radius", "an integer, at least 0", least=0)

    def promote(self, seen: Seen) -> Tensor:
        masked, c = seen.masked, seen.confidence
        anchor = masked & (c > seen.tau_dec)
        position = torch.arange(masked.shape[-1], device=masked.device)
        close = (position - position.unsqueeze(-1)).abs() <= self.radius
        near = (anchor.unsqueeze(-2) & close).any(dim=-1)
        return or_best(anchor | (masked & near & (c > self.relaxed_threshold)), c, masked)


# SPD with one idea after another taken away (the paper's Tables 3 and 4)
ABLATIONS = {
    "spd": Ablation(prefix=True, revise=True, soft=True),
    "hybrid": Ablation(prefix=False, revise=True, soft=True),
    "hard_prefix": Ablation(prefix=True, revise=True, soft=False),
    "hard": Ablation(prefix=False, revise=True, soft=False),
    "threshold": Ablation(prefix=False, revise=False, soft=False),
}
# What `spd_generate(rule=name)` knows by name; for other options, pass an instance
RULES: dict[str, Rule] = {
    **ABLATIONS,
    "spd": SoftParallel(),
    "factor": Factor(),
    "hierarchical": Hierarchical(),
    "top_n": TopN(),
    "autoregressive": Autoregressive(),
    "random": Random(),
    "entropy_bound": EntropyBound(),
    "margin": Margin(),
    "uniform": Uniform(),
    "parallel_forced": ParallelForced(),
    "local_leap": LocalLeap(),
    "prophet": Prophet(),
    "sched": SchED(),
    "credit": Credit(),
    "edit": Edit(),
}


def find_rule(config: DecodeConfig) -> Rule:
    """The rule that a configuration names or holds."""
    rule = RULES.get(config.rule) if isinstance(config.rule, str) else config.rule
    need = f"{one_of(RULES)}, or a Rule"
    require(isinstance(rule, Rule), "spd_generate: rule", need, repr(config.rule))
    assert isinstance(rule, Rule)
    require(
        config.suppress_mask or not isinstance(rule, Edit),
        "spd_generate: suppress_mask",
        "True with rule 'edit', where a predicted mask token would take a token back",
        "False",
    )
    require(
        config.semantics != "released"
        or (isinstance(rule, SoftParallel) and config.convergence == "both"),
        "spd_generate: semantics",
        "'settled' or 'paper' unless rule is 'spd' and convergence is 'both'",
        f"'released' with rule '{config.rule}' and convergence '{config.convergence}'",
    )
    check_sampling(rule, config, steps_composed=type(rule) is SoftParallel)
    return rule
