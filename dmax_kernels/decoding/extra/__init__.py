"""Other papers' ideas, built on the loop: NAP's canvas, and how left-to-right a decoding was."""

from dmax_kernels.decoding.extra.arness import arness, commit_order, global_arness, local_arness
from dmax_kernels.decoding.extra.nap import Canvas, nap_generate

__all__ = [
    "Canvas",
    "arness",
    "commit_order",
    "global_arness",
    "local_arness",
    "nap_generate",
]
