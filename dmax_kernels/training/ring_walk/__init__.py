"""The recipe of the checkpoints that ship here: `python -m dmax_kernels train --config ring_walk`.

Four runs of `dmax_kernels.training.loop` and a self-distillation: `stages.py` has their numbers.
"""
