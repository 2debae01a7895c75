"""Block-wise decoding of diffusion language models; Soft Parallel Decoding is the default rule.

Read in this order: `spd.py` (spd_generate -> prefill -> step -> advance), `state.py` (what a step
changes), `forward.py` (the forward pass and its KV cache), `rules.py` (the paper's ablations),
`settings.py` (arguments and their errors), `trace.py` (what happened, as JSON).
"""

from dmax_kernels.decoding.output import GenerationOutput, Statistics
from dmax_kernels.decoding.requests import CommittedBlock
from dmax_kernels.decoding.rule import Rule
from dmax_kernels.decoding.rules import RULES
from dmax_kernels.decoding.spd import spd_generate
from dmax_kernels.decoding.state import BlockState, LiveBlocks
from dmax_kernels.decoding.trace import Trace

__all__ = [
    "RULES",
    "BlockState",
    "CommittedBlock",
    "GenerationOutput",
    "LiveBlocks",
    "Rule",
    "Statistics",
    "Trace",
    "spd_generate",
]
