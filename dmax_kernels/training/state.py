"""What a run resumes from, as a flat dict of tensors: weights and the optimizers' moments.

The generators need no state: every step seeds them from its own number. Sharded tensors (DTensor)
stay sharded, each process writes its own part, and a run may go on with another number of them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer


def training_state(
    parameters: Mapping[str, nn.Parameter], optimizers: list[Optimizer]
) -> dict[str, Tensor]:
    """References to every tensor that a step changes: to be written, or to be read into."""
    state = {f"weight.{name}": parameter.detach() for name, parameter in parameters.items()}
    names = {id(parameter): name for name, parameter in parameters.items()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                for key, value in moments(optimizer, parameter).items():
                    state[f"optimizer.{names[id(parameter)]}.{key}"] = value
    return state


def moments(optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """The optimizer's state of a parameter, with zeros made where no step has made it yet."""
    state = optimizer.state[parameter]
    if not state:
        if isinstance(optimizer, AdamW):
            state["step"] = torch.zeros((), dtype=torch.float32)
            keys = ("exp_avg", "exp_avg_sq")
        else:
            keys = ("momentum",)
        for key in keys:
            state[key] = torch.zeros_like(parameter).detach()
    return state
