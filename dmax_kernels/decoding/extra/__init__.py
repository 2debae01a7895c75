"""Other papers' ideas, built on the loop.

NAP's canvas, its measures of how left-to-right a decoding and how sequential a text is, and
decoding with drafts.
"""

from dmax_kernels.decoding.extra.arness import (
    arness,
    commit_order,
    commit_steps,
    fair_arness,
    global_arness,
    local_arness,
)
from dmax_kernels.decoding.extra.draft import draft_generate
from dmax_kernels.decoding.extra.nap import Canvas, nap_generate
from dmax_kernels.decoding.extra.order_picture import write_order_picture
from dmax_kernels.decoding.extra.seq_dep import SeqDep, seq_dep

__all__ = [
    "Canvas",
    "SeqDep",
    "arness",
    "commit_order",
    "commit_steps",
    "draft_generate",
    "fair_arness",
    "global_arness",
    "local_arness",
    "nap_generate",
    "seq_dep",
    "write_order_picture",
]
