"""The demonstration, all of it: a task, a tiny model, its training from nothing, what it shows.

`task.py` is the task (walks on a ring), `model/` the model, `weights/` its three checkpoints.
`stages.py` and `recipe.py` say how these were trained (`train --config ring_walk`: four runs of
`dmax_kernels.training` and a self-distillation), from `data.py` and `distill.py`. `evaluate.py`
decodes and grades; `tables.py`, `page.py` and `picture.py` are what `demo` prints and writes.
"""
