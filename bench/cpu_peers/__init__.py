"""What an expert would write on a CPU in place of each op: the candidates ours must not lose to.

Eager PyTorch that reads the logits as few times as its functions allow (argmax and logsumexp, not
softmax and then max), the same compiled by torch.compile with static shapes, numpy, and, for rules
that draw, llama.cpp's worker. All give the op's results to the precision of their dtype.
"""

from bench.cpu_peers import draws, rows, steps, training
from bench.cpu_peers.registry import CPU_PEERS, add_cpu_peers

__all__ = ["CPU_PEERS", "add_cpu_peers", "draws", "rows", "steps", "training"]
