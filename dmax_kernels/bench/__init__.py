"""What is timed: every op's work beside the eager PyTorch it replaces, and how it is measured.

``python -m dmax_kernels bench OP --shape 32x157184`` measures one op at one shape;
``bench/bench_<op>.py`` in the source tree list the cases that are kept, ``bench/run.py`` runs them.
"""

from dmax_kernels.bench import embeddings, linear, loops, losses, rows
from dmax_kernels.bench.workload import WORKLOADS, Inputs, Work, Workload

__all__ = [
    "WORKLOADS",
    "Inputs",
    "Work",
    "Workload",
    "embeddings",
    "linear",
    "loops",
    "losses",
    "rows",
]
