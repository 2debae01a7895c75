"""On-Policy Uniform Training (arXiv 2604.08302, section 3.1) of block-diffusion language models.

Read in this order: `config.py` (every number of a run), `records.py` and `data.py` (conversations
to batches), `corrupt.py` (what is masked), `layout.py` (what sees what), `step.py` (rollout, two
passes, loss), `model.py` (hidden states and head; sharding), `optim.py` and `schedule.py`,
`state.py` and `checkpoints.py` (resuming), `metrics.py`, and `loop.py`, which is all of it in
order; `run.py` is what the command calls.
"""
