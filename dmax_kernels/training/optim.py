"""The weights that the optimizer steps, AdamW and Muon, and the learning rates over a run."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from dmax_kernels.training.config import TrainConfig

# A quintic whose iterates push singular values towards 1 (K. Jordan et al., "Muon", 2024)
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5


def orthogonalize(matrices: Tensor) -> Tensor:
    """Replaces the singular values of each matrix [..., M, N] by values near 1, in float32.

    GPU implementations use bfloat16, which is slower on most CPUs and differs between them.
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(Optimizer):
    """Orthogonal momentum: W <- W - lr sqrt(max(1, rows / columns)) orthogonalize(momentum)."""

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            # Matrices of one shape go through the iteration as one batch, which saves many calls.
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for param in group["params"]:
                if param.grad is not None:
                    by_shape.setdefault(param.shape, []).append(param)
            for (rows, columns), params in by_shape.items():
                updates = []
                for param in params:
                    state = self.state[param]
                    if "momentum" not in state:
                        state["momentum"] = torch.zeros_like(param)
                    state["momentum"].lerp_(param.grad, 1 - group["momentum"])
                    # Nesterov: look ahead along the momentum.
                    updates.append(param.grad.lerp(state["momentum"], group["momentum"]))
                step_size = group["lr"] * max(1.0, rows / columns) ** 0.5
                for param, update in zip(params, orthogonalize(torch.stack(updates)), strict=True):
                    param.sub_(update, alpha=step_size)


def build_optimizers(
    config: TrainConfig, parameters: dict[str, nn.Parameter], layer_names: set[str]
) -> list[Optimizer]:
    """AdamW; or Muon on the matrices inside the layers, then AdamW on everything else.

    Args:
        layer_names: names of the parameters inside the decoder's layers.
    """
    muon_names = set()
    if config.optimizer == "muon":
        muon_names = {name for name, p in parameters.items() if p.dim() == 2} & layer_names
    matrices = [p for name, p in parameters.items() if name in muon_names]
    others = [p for name, p in parameters.items() if name not in muon_names]
    adamw = AdamW(
        others, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay
    )
    return [Muon(matrices, lr=config.muon_learning_rate), adamw] if matrices else [adamw]


def learning_rate_factor(config: TrainConfig, step: int) -> float:
    """The factor on the peak rates at `step`, counted from 0; `config.steps` must be set.

    With W warm-up steps, S steps in all and F = decay_to, the factor rises as min(1, (step + 1)/W).
    Then it is F + (1 - F) f, where f is (1 + cos(pi (step - W) / (S - W))) / 2 for "cosine" and
    min(1, (S - step) / (S - decay_from S)) for "linear", and 1 for "constant".
    """
    steps, warmup, least = config.steps, config.warmup_steps, config.decay_to
    if config.warmup_fraction is not None:
        warmup = int(steps * config.warmup_fraction)
    rising = min(1.0, (step + 1) / warmup) if warmup else 1.0
    if config.schedule == "linear":
        falling = steps * (1 - config.decay_from)
        left = min(1.0, (steps - step) / falling) if falling else 1.0
        return min(rising, least + (1 - least) * left)
    if config.schedule == "cosine" and step >= warmup:
        fallen = (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2
        return least + (1 - least) * fallen
    return rising


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


class MasterWeights:
    """float32 weights that the optimizer steps, for a model that computes in bfloat16.

    bfloat16 has 8 bits of precision, so a relative step of 2e-6 would be lost to rounding in the
    model's own weights. Gradients are added up over micro batches in float32.
    """

    def __init__(self, model: nn.Module) -> None:
        parameters = trained_parameters(model)
        self.named = {name: nn.Parameter(p.detach().clone()) for name, p in parameters.items()}
        model.to(torch.bfloat16)
        self.model = trained_parameters(model)

    def take_gradients(self) -> None:
        """Moves the gradients of one micro batch from the model to these weights."""
        for name, parameter in self.model.items():
            if parameter.grad is not None:
                master = self.named[name]
                gradient = parameter.grad.float()
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)
                parameter.grad = None

    @torch.no_grad()
    def publish(self) -> None:
        """Rounds these weights into the model's."""
        for name, parameter in self.model.items():
            parameter.copy_(self.named[name])


class OwnWeights:
    """The model's own parameters, where the optimizer steps them directly."""

    def __init__(self, model: nn.Module) -> None:
        self.named = trained_parameters(model)

    def take_gradients(self) -> None:
        pass

    def publish(self) -> None:
        pass
