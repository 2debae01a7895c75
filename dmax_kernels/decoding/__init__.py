"""Block-wise decoding of diffusion language models; Soft Parallel Decoding is the default rule.

Read in this order: `spd.py` (spd_generate: check, prefill, run), `batch.py` (step, advance, leave),
`state.py` (what a step changes), `forward.py` and `cache.py` (the forward pass, rows at different
places), `rule.py` (what a rule gets and does), `rules.py` (the paper's, and its ablations),
`requests.py` (a row on the host), `polling.py` and `graph.py` (what a GPU is not waited for, and
its captured step), `settings.py` and `prompts.py` (arguments and their errors), `output.py`,
`trace.py` (what happened, as JSON).
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
