"""Block-wise decoding of diffusion language models; Soft Parallel Decoding is the default rule.

Read in this order: `spd.py` (spd_generate -> prefill -> step -> advance), `config.py` (every
option), `prompts.py`, `masks.py` and `penalties.py` (what each row brings), `batch.py` (rows that
start together and end one by one), `state.py` (what a step changes), `step.py` (the step) and
`rules.py` (which masks it fills; `early_exit.py` and `memory_rules.py` have more of them).
`embedding.py`, `forward.py`, `cache.py` and `graph.py` run the model; `output.py` and `trace.py`
hold what comes back. `extra` has two other papers' ideas on the same loop.
"""

from dmax_kernels.decoding.batch import CommittedBlock
from dmax_kernels.decoding.config import DecodeConfig, RunConfig
from dmax_kernels.decoding.masks import NextBlock
from dmax_kernels.decoding.memory_rules import AdaBlock
from dmax_kernels.decoding.output import GenerationOutput, Statistics
from dmax_kernels.decoding.rules import (
    RULES,
    Autoregressive,
    Credit,
    Edit,
    EntropyBound,
    Factor,
    Hierarchical,
    LocalLeap,
    Margin,
    ParallelForced,
    Prophet,
    Random,
    SchED,
    TopN,
    Uniform,
)
from dmax_kernels.decoding.spd import spd_generate
from dmax_kernels.decoding.state import BlockState, LiveBlocks
from dmax_kernels.decoding.step import ComposedRule, Rule, Seen
from dmax_kernels.decoding.trace import Trace

__all__ = [
    "RULES",
    "AdaBlock",
    "Autoregressive",
    "BlockState",
    "CommittedBlock",
    "ComposedRule",
    "Credit",
    "DecodeConfig",
    "Edit",
    "EntropyBound",
    "Factor",
    "GenerationOutput",
    "Hierarchical",
    "LiveBlocks",
    "LocalLeap",
    "Margin",
    "NextBlock",
    "ParallelForced",
    "Prophet",
    "Random",
    "Rule",
    "RunConfig",
    "SchED",
    "Seen",
    "Statistics",
    "TopN",
    "Trace",
    "Uniform",
    "spd_generate",
]
