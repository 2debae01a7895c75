"""Accuracy against parallelism: what `python -m dmax_kernels evaluate` and `demo` measure.

`cells.py` decodes problems and keeps what happened to each; `grading.py` says which responses are
right; `metrics.py` has the figures (tokens per forward, AUP, paired intervals), `report.py` the
tables and `picture.py` the picture.
"""
