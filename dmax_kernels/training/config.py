"""Every setting of a training run, with its help text; the command's options are these fields."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

from dmax_kernels._checks import option, require
from dmax_kernels._numbers import as_integer, as_number, shown

# Objectives that have a masked pass and no second one
ONE_PASS = ("mdlm", "certainty")

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
        "oput: L_mask + L_pred over all response positions (Eqs. 3-6); uniform: the same with "
        "tokens drawn uniformly from the vocabulary in place of the model's own (Eq. 2); mdlm: "
        "plain masked diffusion on masked positions (Eq. 1); certainty: mdlm, plus the entropy "
        "where the model predicts right (dParallel's certainty forcing). The last two see two "
        "corruptions of each sequence in a step",
        ("oput", "uniform", "mdlm", "certainty"),
    )
    passes: str = option(
        "joint",
        "oput and uniform. joint: both passes in every step; alternating: the masked pass in even "
        "steps and the second one in odd steps, on the same sequences (as the paper saves memory); "
        "second: the second pass alone, which for uniform is Eq. 2 and nothing else",
        ("joint", "alternating", "second"),
    )
    share_masks: bool = option(
        False,
        "with alternating passes: the second step masks what the first one masked, as Eq. 3 reads, "
        "rather than drawing new masks",
    )
    mask_ratio: tuple[float, float] = option(
        (0.75, 0.75), "the corruption level t ~ Uniform(LOW, HIGH) of mask_level sequence"
    )
    mask_level: str | None = option(
        None,
        "what draws a level t. sequence: each sequence, from --mask-ratio, and each of its "
        "positions is masked with probability t (section 3.1); block: each block, from {1..K}/K, "
        "and exactly that share of it is masked (default: sequence for oput and uniform, block for "
        "mdlm and certainty)",
        ("sequence", "block"),
    )
    mask_weight: str = option(
        "equal",
        "mdlm only. equal: every masked position weighs the same; inverse: it weighs 1/t, as in "
        "Eq. 1 (which is all of Eq. 1 with --mask-level sequence --mask-ratio 0 1)",
        ("equal", "inverse"),
    )
    certainty_beta: float = option(1.0, "certainty only: what the entropy weighs")
    certainty_temperature: float = option(
        1.0, "certainty only: the entropy is that of softmax(logits / this); dParallel takes 0.5"
    )
    loss_average: str = option(
        "tokens",
        "tokens: the mean over all positions of the batch that count; sequences: the mean over the "
        "sequences of each one's own mean (as released, with one sequence in a micro batch)",
        ("tokens", "sequences"),
    )
    rollout_temperature: float = option(
        1.0,
        "oput only. 1 samples the rollout from the model, as in the paper; 0 is greedy, as "
        "released",
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
        "how the rate falls after the warm-up: cosine, linear, or constant",
        ("cosine", "linear", "constant"),
    )
    warmup_steps: int = option(20, "steps over which the rate rises linearly to its peak")
    warmup_fraction: float | None = option(
        None, "these steps as a fraction of all; overrides --warmup-steps"
    )
    decay_from: float = option(0.0, "fraction of the steps after which a linear schedule falls")
    decay_to: float = option(0.0, "fraction of the peak rate to which cosine and linear fall")
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
    shifted_logits: bool = option(
        False,
        "the model's logits at a position predict the next one, as those of an autoregressive "
        "model do (Dream, Fast-dLLM v2)",
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
            free = choices is None or (value is None and item.default is None)
            require(free or value in choices, item.name, f"one of {choices}", value)
        for name in ("block_length", "batch_size", "save_every"):
            require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        for name in ("steps", "micro_batch_size"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, "at least 1", value)
        for name in ("learning_rate", "muon_learning_rate", "epochs", "certainty_temperature"):
            require(getattr(self, name) > 0, name, "positive", getattr(self, name))
        for name in (
            *("warmup_steps", "weight_decay", "rollout_temperature", "keep", "certainty_beta"),
        ):
            require(getattr(self, name) >= 0, name, "at least 0", getattr(self, name))
        low, high = self.mask_ratio
        require(0 <= low <= high <= 1, "mask_ratio", "0 <= LOW <= HIGH <= 1", self.mask_ratio)
        require(high > 0, "mask_ratio", "above 0: nothing would be masked", self.mask_ratio)
        for name in ("decay_from", "decay_to", "warmup_fraction"):
            value = getattr(self, name)
            require(value is None or 0 <= value <= 1, name, "in [0, 1]", value)
        if self.clip_norm is not None:
            require(self.clip_norm >= 0, "clip_norm", "at least 0", self.clip_norm)
        if self.objective in ONE_PASS:
            need = f"joint with objective {self.objective}"
            require(self.passes == "joint", "passes", need, self.passes)
        alternating = self.passes == "alternating"
        need = "alternating with share_masks"
        require(alternating or not self.share_masks, "passes", need, self.passes)
        plain = self.mask_weight == "equal" or self.objective == "mdlm"
        require(plain, "objective", "mdlm with mask_weight inverse", self.objective)
        if self.mask_level is None:
            level = "block" if self.objective in ONE_PASS else "sequence"
            object.__setattr__(self, "mask_level", level)  # frozen, but still being built

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


# Where the paper's text (sections 3.1 and 4.1) and the released training
# (dFactory/configs/sft/llada2_mini_bd_oput.yaml and its task) differ. Where the paper says nothing,
# its preset names this package's default. In both, the ratio 0.75, the block length 32, 2 epochs,
# batch size 8, the rate 2e-6 and the cosine are those of the defaults.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "passes": "alternating",
        "share_masks": True,
        "rollout_temperature": 1.0,
        "loss_average": "tokens",
        "eos_tail": "block",
        "betas": (0.9, 0.95),
        "weight_decay": 0.0,
        "warmup_fraction": None,
        "decay_to": 0.0,
        "precision": "float32",
        "max_length": None,
    },
    "released": {
        "passes": "alternating",
        "share_masks": False,
        "rollout_temperature": 0.0,
        "loss_average": "sequences",
        "eos_tail": "released",
        "betas": (0.9, 0.999),
        "weight_decay": 0.01,
        "warmup_fraction": 0.03,
        "decay_to": 0.05,  # 1e-7, the trainer's lr_min
        "precision": "bf16-master",
        "max_length": 2048,
    },
}


def with_preset(options: dict[str, Any]) -> dict[str, Any]:
    """The options, over those of the preset that they name. Given options always win."""
    options = dict(options)
    name = options.pop("preset", None)
    if name is None:
        return options
    require(name in PRESETS, "--preset", f"one of {tuple(PRESETS)}", name)
    preset = dict(PRESETS[name])
    if options.get("objective") in ONE_PASS:
        del preset["passes"], preset["share_masks"]
    if options.get("passes", "alternating") != "alternating":
        preset.pop("share_masks", None)
    if "warmup_steps" in options:
        del preset["warmup_fraction"]
    return {**preset, **options}


# What a resumed run may change: these settings affect the losses by rounding at most.
FREE_TO_CHANGE = frozenset(
    {
        *("micro_batch_size", "attention", "loss_from", "gradient_checkpointing", "ops"),
        *("save_every", "keep"),
    }
)


def check_same_run(saved: dict[str, Any], current: dict[str, Any], path: object) -> None:
    """Refuses to resume the run at `path` with settings or data that it was not begun with."""
    for name, value in json.loads(json.dumps(current)).items():  # as the saved ones were written
        if name not in FREE_TO_CHANGE and saved.get(name) != value:
            raise ValueError(
                f"{path} must belong to a run with {name} = {value}, got {saved.get(name)}; give "
                "that value, choose a different folder, or delete this one"
            )
