"""AdamW, or Muon for the hidden matrices with AdamW for the embedding and the head."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from dmax_kernels.training.config import TrainConfig

# Quintic whose iterates push singular values towards 1 (K. Jordan et al., "Muon", 2024).
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5


def orthogonalize(matrices: Tensor) -> Tensor:
    """Replaces the singular values of each matrix [..., M, N] by about 1, in float32.

    bfloat16, which is usual on GPUs, is slower on most CPUs and differs between them.
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
            # Matrices of one shape go through the iteration together: 8 calls fewer per matrix.
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
    config: TrainConfig, parameters: dict[str, nn.Parameter], layers: set[str]
) -> list[Optimizer]:
    """AdamW; or Muon on the matrices inside the layers and AdamW on everything else.

    Args:
        layers: names of the parameters inside the decoder's layers.
    """
    hidden = [p for name, p in parameters.items() if name in layers and p.dim() == 2]
    if config.optimizer == "adamw":
        hidden = []
    taken = {id(p) for p in hidden}
    others = [p for p in parameters.values() if id(p) not in taken]
    adamw = AdamW(
        others, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay
    )
    return [Muon(hidden, lr=config.muon_learning_rate), adamw] if hidden else [adamw]
