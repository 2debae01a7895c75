"""A workload: an op's inputs at given sizes, and the candidates that do the same work on them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

VOCAB = 157184  # LLaDA-2.0-mini's vocabulary, hidden size, block, mask token
DIM = 2048
BLOCK = 32
MASK = 156895

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
VALUES = ("flat", "peaked")
# Candidates that are not peers: the op itself, the cheaper op it is compared with, its variants
OURS = ("fused", "top1_confidence", "one kernel", "products of chunks")


@dataclass
class Inputs:
    """Makes a workload's tensors, always the same ones for the same sizes."""

    dtype: torch.dtype = torch.bfloat16
    device: str = "cpu"
    values: str = "flat"

    def __post_init__(self) -> None:
        self.generator = torch.Generator(self.device).manual_seed(0)

    def logits(self, rows: int, vocab: int) -> Tensor:
        """Rows of an unsure model ("flat": every exponential counts) or of a sure one ("peaked":
        one logit stands far above the noise, as late in decoding)."""
        if self.values == "flat":
            return self.normal(rows, vocab, scale=3.0)
        logits = self.normal(rows, vocab)
        logits[torch.arange(rows, device=self.device), self.ids(rows, below=vocab)] = 60.0
        return logits

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        noise = torch.empty(shape, dtype=torch.float32, device=self.device)
        return noise.normal_(generator=self.generator).mul_(scale).to(self.dtype)

    def uniform(self, *shape: int) -> Tensor:
        values = torch.empty(shape, dtype=torch.float32, device=self.device)
        return values.uniform_(generator=self.generator)

    def ids(self, *shape: int, below: int) -> Tensor:
        return torch.randint(0, below, shape, generator=self.generator, device=self.device)

    def seed(self) -> Tensor:
        return torch.tensor([1, 2], device=self.device)


@dataclass
class Work:
    """What is timed. The first candidate is what others are compared with; "fused" is ours."""

    candidates: dict[str, Callable[[], object]]
    bytes_moved: int = 0  # the minimum: every input read once, every output written once
    flops: int = 0  # floating-point operations of matrix products; the rest is bound by bytes
    dtype: torch.dtype = torch.float32  # of those products
    restore: Callable[[], object] | None = None  # untimed: restores what the candidates overwrite
    given: dict[str, Any] = field(default_factory=dict)  # what they work on, for further candidates
    writes: bool = False  # about as much as it reads: the roof is then a copy, else a read


@dataclass
class Workload:
    """How to make an op's work from its sizes."""

    name: str
    sizes: dict[str, int]  # name -> default, in the order of --shape
    build: Callable[..., Work]

    def work(self, inputs: Inputs, sizes: tuple[int, ...] = ()) -> Work:
        if len(sizes) > len(self.sizes):
            raise ValueError(
                f"{self.name} has the sizes {self.shape_names}, got {'x'.join(map(str, sizes))}"
            )
        return self.build(inputs, **dict(zip(self.sizes, self.all_sizes(sizes), strict=True)))

    def all_sizes(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        """The given sizes, with defaults for the rest."""
        return (*sizes, *list(self.sizes.values())[len(sizes) :])

    @property
    def shape_names(self) -> str:
        return " x ".join(self.sizes)


WORKLOADS: dict[str, Workload] = {}


def workload(build: Callable[..., Work]) -> Callable[..., Work]:
    """Registers a builder under its name; its sizes are its arguments after ``inputs``."""
    sizes = {
        name: parameter.default
        for name, parameter in inspect.signature(build).parameters.items()
        if name != "inputs"
    }
    WORKLOADS[build.__name__] = Workload(build.__name__, sizes, build)
    return build
