"""The demonstration, all of it: a task, a tiny model, its training from nothing, what it shows.

`task.py` is the task (walks on a ring), `model/` the model, `weights/` its checkpoints. `stages.py`
and `recipe.py` say how base, oput and control were trained (`train --config ring_walk`: four runs
of `dmax_kernels.training` and a self-distillation), from `data.py` and `distill.py`. `ladder.py`
trains every method of the paper at several lengths from that base (`train --config
ring_walk_ladder`), and `record.py` keeps what each of these decodes. `evaluate.py` decodes and
grades. `claims.py` is the list of the paper's claims with their tests (`judging.py`). `tables.py`,
`rules_table.py`, `page.py` and `picture.py` are what `demo` prints and writes.
"""
