"""The second demonstration: word problems in English, from the templates of GSM-Symbolic.

`problems.py` writes the problems' file (from the package reasoning-gym, which nothing else needs);
`task.py` is the task: its file, its tokenizer, its grade. `recipe.py` trains the six models
(`train --config gsm`), with the ring walk's model, its batches and `dmax_kernels.training`.
"""
