"""Helpers for the Python half of an op: what LibTorch's stable C++ API has no call for."""

from collections.abc import Callable

import torch


def register_fake(name: str) -> Callable:
    """Shapes and dtypes without data, for torch.compile and meta tensors."""
    return torch.library.register_fake(f"dmax::{name}")


def register_not_differentiable(name: str, advice: str) -> None:
    """A backward pass through the op raises one clear line instead of a silent zero."""

    def backward(ctx, *grads):
        raise RuntimeError(f"{name}: has no gradient; {advice}")

    torch.library.register_autograd(f"dmax::{name}", backward)
