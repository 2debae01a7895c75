"""Block-wise decoding of diffusion language models; Soft Parallel Decoding is the default rule.

Read in this order: `spd.py` (spd_generate -> prefill -> step -> advance), `state.py` (what a step
changes), `forward.py` (the forward pass and its KV cache), `rules.py` (the paper's ablations),
`settings.py` (arguments and their errors), `trace.py` (what happened, as JSON).

Decoders beside SPD, for comparison and for models without OPUT: `unmasking.py` (one class each),
`promote.py` (what each promotes, one pure function each), `composed.py` (the step around it),
`nap.py` (a canvas of parallel reasoning slots), `arness.py` (how left-to-right a decoding was).
"""

from dmax_kernels.decoding.arness import arness, commit_order, global_arness, local_arness
from dmax_kernels.decoding.composed import ComposedRule
from dmax_kernels.decoding.nap import Canvas, nap_generate
from dmax_kernels.decoding.output import GenerationOutput, Statistics
from dmax_kernels.decoding.requests import CommittedBlock
from dmax_kernels.decoding.rule import Rule
from dmax_kernels.decoding.rules import RULES
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
    "Canvas",
    "CommittedBlock",
    "ComposedRule",
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
    "TopN",
    "Trace",
    "Uniform",
    "arness",
    "commit_order",
    "global_arness",
    "local_arness",
    "nap_generate",
    "spd_generate",
]
