"""Every setting of a training run, with its help text; the command's options are these fields."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

from dmax_kernels._checks import option, require
from dmax_kernels._numbers import as_integer, as_number, shown

# For each type of number, how a field is read and what it must be
KINDS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "int": (as_integer, "an integer"),
    "float": (as_number, "a number"),
}


@dataclass(frozen=True)
class TrainConfig:
    """One run. The defaults are the paper's where it gives a number (section 4.1).

    What happens in step i depends only on these settings, the data and i. A resumed run therefore
    gives the same losses as an uninterrupted one. So do different micro batches and a different
    number of processes, up to rounding.
    """

    objective: str = option(
        "oput",
        "oput: L_mask + L_pred over all response positions (Eqs. 3-6); mdlm: plain masked "
        "diffusion on masked positions (Eq. 1), with two corruptions of each sequence",
        ("oput", "mdlm"),
    )
    passes: str = option(
        "joint",
        "oput only. joint: both passes in every step; alternating: the masked pass in even steps "
        "and the predicted pass in odd steps, on the same sequences (as the paper saves memory)",
        ("joint", "alternating"),
    )
    mask_ratio: tuple[float, float] = option(
        (0.75, 0.75), "oput's corruption level t ~ Uniform(LOW, HIGH), drawn once per sequence"
    )
    rollout_temperature: float = option(
        1.0, "1 samples the rollout from the model, as in the paper; 0 is greedy, as released"
    )
    block_length: int = option(32, "number of positions that are denoised together")
    eos_tail: str = option(
        "block",
        "which of the end-of-sequence tokens after a response are learnt. block: those up to the "
        "end of the block that holds the first; released: one block length, from the first on",
        ("block", "released"),
    )
    steps: int | None = option(None, "optimizer steps; overrides --epochs")
    epochs: float = option(2.0, "passes over the data")
    batch_size: int = option(8, "sequences in an optimizer step, over all processes")
    micro_batch_size: int | None = option(
        None, "sequences in a forward pass; gradients are accumulated over the forward passes of a "
        "step (default: a process's whole share at once)"
    )  # fmt: skip
    optimizer: str = option(
        "adamw",
        "adamw, or muon: Muon on the matrices inside the layers and AdamW on the rest",
        ("adamw", "muon"),
    )
    learning_rate: float = option(2e-6, "peak rate of AdamW")
    muon_learning_rate: float = option(0.02, "peak rate of Muon")
    weight_decay: float = option(0.0, "AdamW's decoupled weight decay")
    betas: tuple[float, float] = option((0.9, 0.95), "AdamW's decay rates of its two moments")
    schedule: str = option(
        "cosine",
        "how the rate falls after the warm-up: cosine to 0, linear to 0, or constant",
        ("cosine", "linear", "constant"),
    )
    warmup_steps: int = option(20, "steps over which the rate rises linearly to its peak")
    decay_from: float = option(0.0, "fraction of the steps after which a linear schedule falls")
    clip_norm: float | None = option(1.0, "largest norm of the gradient; 0 turns clipping off")
    precision: str = option(
        "float32",
        "float32; bf16-autocast: float32 weights and bfloat16 matrix products; bf16-master: "
        "bfloat16 weights and activations, with float32 master weights in the optimizer",
        ("float32", "bf16-autocast", "bf16-master"),
    )
    attention: str = option(
        "sdpa",
        "sdpa: one square mask per shape (also for a model that has only eager attention); flex: "
        "FlexAttention with a BlockMask, which never stores a square mask (its backward pass needs "
        "a GPU)",
        ("sdpa", "flex"),
    )
    loss_from: str = option(
        "hidden",
        "hidden: from the hidden states and the head's weight, without storing logits; logits: "
        "from the model's own logits, for a head that is more than a matrix and a scale (a "
        "softcap, layers, an adapter)",
        ("hidden", "logits"),
    )
    gradient_checkpointing: bool = option(False, "recompute layers in the backward pass")
    ops: str = option(
        "fused",
        "fused: this package's kernels compute the loss and the rollout; reference: plain PyTorch",
        ("fused", "reference"),
    )
    seed: int = option(0, "seed for the order of the data, the corruption and the rollout")
    save_every: int = option(500, "steps between checkpoints; there is always one at the end")
    keep: int = option(2, "how many of the newest checkpoints to keep; 0 keeps all")

    def __post_init__(self) -> None:
        for item in fields(self):
            self._read_number(item.name, item.type.removesuffix(" | None"))
            value, choices = getattr(self, item.name), item.metadata["choices"]
            require(choices is None or value in choices, item.name, f"one of {choices}", value)
        for name in ("block_length", "batch_size", "save_every"):
            require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        for name in ("steps", "micro_batch_size"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, "at least 1", value)
        for name in ("learning_rate", "muon_learning_rate", "epochs"):
            require(getattr(self, name) > 0, name, "positive", getattr(self, name))
        for name in ("warmup_steps", "weight_decay", "rollout_temperature", "keep"):
            require(getattr(self, name) >= 0, name, "at least 0", getattr(self, name))
        low, high = self.mask_ratio
        require(0 <= low <= high <= 1, "mask_ratio", "0 <= LOW <= HIGH <= 1", self.mask_ratio)
        require(high > 0, "mask_ratio", "above 0: nothing would be masked", self.mask_ratio)
        require(0 <= self.decay_from <= 1, "decay_from", "in [0, 1]", self.decay_from)
        if self.clip_norm is not None:
            require(self.clip_norm >= 0, "clip_norm", "at least 0", self.clip_norm)
        if self.objective == "mdlm":
            require(self.passes == "joint", "passes", "joint with objective mdlm", self.passes)

    def _read_number(self, name: str, kind: str) -> None:
        """Stores a number as Python's own type: NumPy's, for example, cannot be written as JSON."""
        value = getattr(self, name)
        if value is not None and kind in KINDS:
            read, need = KINDS[kind]
            number = read(value)
            require(number is not None, name, need, shown(value))
            object.__setattr__(self, name, number)  # frozen, but still being built

    def as_dict(self) -> dict[str, Any]:
        """The fields as lists and scalars, exactly as they come back from a JSON file."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


# What a resumed run may change: these settings affect the losses by rounding at most.
FREE_TO_CHANGE = frozenset(
    {
        *("micro_batch_size", "attention", "loss_from", "gradient_checkpointing", "ops"),
        *("save_every", "keep"),
    }
)


def check_same_run(saved: dict[str, Any], current: dict[str, Any], path: object) -> None:
    """Refuses to resume the run at `path` with settings or data that it was not begun with."""
    for name, value in current.items():
        if name not in FREE_TO_CHANGE and saved.get(name) != value:
            raise ValueError(
                f"{path} must belong to a run with {name} = {value}, got {saved.get(name)}; give "
                "that value, choose a different folder, or delete this one"
            )
