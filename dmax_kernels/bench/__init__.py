"""What is timed, and how: every op's work beside the eager PyTorch it replaces, and the timer.

``python -m dmax_kernels bench OP --shape 32x157184`` measures one op at one shape. The source
tree's ``bench/`` has the table of cases that are kept, and what makes pages of their results.
"""

from dmax_kernels.bench import decoding, draws, steps, training
from dmax_kernels.bench.workload import WORKLOADS, Inputs, Work, Workload

__all__ = ["WORKLOADS", "Inputs", "Work", "Workload", "decoding", "draws", "steps", "training"]
