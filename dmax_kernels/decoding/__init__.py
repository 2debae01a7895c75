"""Block-wise decoding of diffusion language models; Soft Parallel Decoding is the default rule.

Read in this order: `spd.py` (spd_generate -> prefill -> step -> advance), `state.py` (what a step
changes), `rule.py` (what a step may do), `batch.py` (rows that start together and end one by one),
`forward.py` and `cache.py` (the forward pass, its keys and values), `settings.py` and `prompts.py`
(arguments and their errors), `output.py` and `trace.py` (what comes back, what happened).
`requests.py`, `polling.py`, `promotion_log.py` and `graph.py` serve the batch: whose row is whose,
what the host learns of a step without waiting, the step as a CUDA graph.

Rules beside SPD, for comparison and for models without OPUT: `named_rules.py` (SPD, the paper's
ablations of it, and every rule by name), `unmasking.py` (one class per other decoder), `promote.py`
(what each promotes, one pure function each), `composed.py` (the step around it), `nap.py` (a canvas
of parallel reasoning slots), `arness.py` (how left-to-right a decoding was).
"""

from dmax_kernels.decoding.composed import ComposedRule, DistributionRule, Top1Rule
from dmax_kernels.decoding.named_rules import RULES
from dmax_kernels.decoding.output import GenerationOutput, Statistics
from dmax_kernels.decoding.requests import CommittedBlock
from dmax_kernels.decoding.rule import Rule
from dmax_kernels.decoding.spd import spd_generate
from dmax_kernels.decoding.state import BlockState, LiveBlocks
from dmax_kernels.decoding.trace import Trace
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

__all__ = [
    "RULES",
    "Autoregressive",
    "BlockState",
    "CommittedBlock",
    "ComposedRule",
    "DistributionRule",
    "EntropyBound",
    "Factor",
    "GenerationOutput",
    "Hierarchical",
    "LiveBlocks",
    "Margin",
    "ParallelForced",
    "Random",
    "Rule",
    "Statistics",
    "Top1Rule",
    "TopN",
    "Trace",
    "Uniform",
    "spd_generate",
]
