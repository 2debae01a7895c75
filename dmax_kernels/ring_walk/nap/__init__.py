"""NAP in miniature (arXiv 2602.23225): ring walks told several times over, and a summary.

`data.py` writes the training texts, `arms.py` trains a model on each kind of them and decodes
held-out problems, `scorer.py` measures how sequential the texts are, `claims.py` has a verdict on
each of the paper's claims, and `report.py` its Tables 1 to 5. One command does all of it:
``python -m dmax_kernels.ring_walk.nap --output FOLDER``.
"""
