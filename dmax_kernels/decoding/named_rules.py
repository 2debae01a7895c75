"""The rules by name: the fused SPD step, the paper's ablations of it, and other decoders.

The ablations (Tables 3 and 4) are put together from the same small ops, so each is SPD with one
idea taken away. All rules work on `LiveBlocks` in place and leave converged rows alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from dmax_kernels.decoding.composed import Top1Rule, composed_step_
from dmax_kernels.decoding.promote import threshold_promote
from dmax_kernels.decoding.rule import Rule
from dmax_kernels.decoding.state import LiveBlocks
from dmax_kernels.decoding.unmasking import (
    Autoregressive,
    EntropyBound,
    Factor,
    Hierarchical,
    Margin,
    ParallelForced,
    Random,
    TopN,
    Uniform,
)

if TYPE_CHECKING:
    from dmax_kernels.decoding.settings import Settings


class SoftParallel(Rule):
    """The paper's rule: one fused step, `spd_step_`."""

    def update_(
        self, logits: Tensor, embedding: Tensor, state: LiveBlocks, settings: Settings
    ) -> None:
        if settings.convergence != "both":
            composed_step_(logits, embedding, state, settings, ABLATIONS["spd"])
            return
        settings.ops.spd_step_(
            logits,
            embedding,
            **state.spd_buffers(),
            mask_token_id=settings.mask_token_id,
            tau_dec=settings.tau_dec,
            tau_acc=settings.tau_acc,
            semantics=settings.semantics,
            top_k=settings.top_k,
            suppress_token=settings.suppress_token,
            thresholds=state.thresholds,
        )


@dataclass(frozen=True)
class Ablation(Top1Rule):
    """Three switches span the paper's Table 3: `revise` and `soft` of every composed rule, and

    prefix: promote only the leftmost run of confident masked positions; otherwise every confident
        one. Where none is confident: the leftmost, or the most confident, so that a step always
        makes progress.
    """

    prefix: bool
    revise: bool
    soft: bool

    def promote(
        self, token: Tensor, confidence: Tensor, state: LiveBlocks, settings: Settings
    ) -> Tensor:
        if not self.prefix:
            return threshold_promote(confidence, state.masked, state.tau_dec)
        # The op's threshold is one number; each row has its own
        passes = (confidence > state.tau_dec).float()
        return settings.ops.prefix_promote(passes, state.masked, 0.5)


ABLATIONS = {
    "spd": Ablation(prefix=True, revise=True, soft=True),
    "hybrid": Ablation(prefix=False, revise=True, soft=True),
    "hard_prefix": Ablation(prefix=True, revise=True, soft=False),
    "hard": Ablation(prefix=False, revise=True, soft=False),
    "threshold": Ablation(prefix=False, revise=False, soft=False),
}
# What `spd_generate(rule=name)` knows by name; with other options, pass the instance
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
}
