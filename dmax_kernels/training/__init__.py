"""On-Policy Uniform Training (arXiv 2604.08302, section 3.1) of block-diffusion language models.

The method is `oput.py` (rollout, two passes, losses) on what `corrupt.py` masks and `layout.py`
packs; the objectives that it is compared with are in `baselines.py`. None of these imports anything
of the trainer. The trainer is `config.py` (every number of a run), `data.py` (conversations to
batches), `model.py` and `prepare.py` (a Hugging Face model, tested before the first step),
`optim.py`, `parallel.py` (FSDP2), `outputs.py` (checkpoints and metrics) and `loop.py`, which puts
them in order. `run.py` is what the command calls. `distill.py` makes training data of a model's own
responses.
"""
