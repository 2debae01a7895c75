"""Trains one arm and decodes held-out problems with it; a task of one process."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dmax_kernels.decoding import Autoregressive, GenerationOutput, Random, TopN, spd_generate
from dmax_kernels.decoding.extra import fair_arness, global_arness, nap_generate
from dmax_kernels.files import save_json, write_atomically
from dmax_kernels.models.checkpoint import load_checkpoint
from dmax_kernels.models.machine import device_name
from dmax_kernels.ring_walk import task
from dmax_kernels.ring_walk.model import TinyDlmConfig, TinyDlmForCausalLM
from dmax_kernels.ring_walk.nap import data
from dmax_kernels.training.config import TrainConfig, check_same_run
from dmax_kernels.training.data import epochs
from dmax_kernels.training.loop import fit
from dmax_kernels.training.parallel import Processes

LENGTH = len(
    data.prompt_ids(task.Problem(0, ("u1",) * data.NUM_MOVES, tuple(range(data.NUM_MOVES))))
)
BLOCK = LENGTH + data.RESPONSE  # prompt and response see each other, as in the paper's models
BUDGETS = (1, 2, 3, 4, 8, 16)  # tokens per step; the paper's Table 3 has the first four
ORDERS = {"ao": TopN, "random": Random, "ar": Autoregressive}
ORDERED = 200  # problems whose order of decoding is measured
# Problems that are decoded together. On a CPU 300 at once take 1.6 times as long as 25 at a time,
# because malloc takes the memory of large results fresh from the kernel
BATCHES = {"cuda": 500, "cpu": 25}


@dataclass(frozen=True)
class Settings:
    """What the figures depend on; a task that is done is not done again under the same settings."""

    base_steps: int
    steps: int
    batch_size: int
    examples: int
    problems: int
    device: str
    ops: str = "reference"

    def of_outcome(self) -> dict[str, Any]:
        """All but the device, which changes the figures by rounding alone."""
        return {name: value for name, value in asdict(self).items() if name != "device"}

    def of_training(self, is_base: bool) -> dict[str, Any]:
        """What the weights depend on."""
        unread = {"problems"} | ({"steps"} if is_base else set())
        return {name: value for name, value in self.of_outcome().items() if name not in unread}


@dataclass(frozen=True)
class Task:
    """An arm and the seed of its training; "base" is trained before the others start from it."""

    arm: str
    seed: int

    @property
    def name(self) -> str:
        return self.arm if self.arm == "base" else f"{self.arm}-{self.seed}"


@dataclass(frozen=True)
class Decoding:
    """ao, random, ar: an order over the whole response; parallel: NAP's, on a canvas."""

    order: str
    tokens_per_step: int


def decodings(arm: str) -> list[Decoding]:
    """How an arm is decoded: what the paper's tables compare."""
    ao = [Decoding("ao", n) for n in BUDGETS]
    parallel = [Decoding("parallel", n) for n in BUDGETS]
    single = [Decoding("random", 1), Decoding("ar", 1)]
    return {
        "base": [*ao, *parallel, *single],
        "long_chain": [*ao, *single],
        "nap_3": [*parallel, *ao],
    }.get(arm, parallel)


def new_model() -> TinyDlmForCausalLM:
    """The shipped base model with one block for everything, and new words for the tags."""
    shipped = load_checkpoint("base")[0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = TinyDlmConfig(
            vocab_size=len(data.WORDS),
            block_length=BLOCK,
            mask_token_id=task.MASK_ID,
            eos_token_id=task.EOS_ID,
            pad_token_id=task.PAD_ID,
        )
        model = TinyDlmForCausalLM(config)
    weights = model.state_dict()
    for name, value in shipped.state_dict().items():
        weights[name][: len(value)] = value  # embedding and head have more rows than the shipped
    return model.eval()


def train(settings: Settings, chosen: Task, folder: Path) -> TinyDlmForCausalLM:
    """Plain masked diffusion; each arm starts from the base, and the base from the shipped one.

    What FOLDER has of the arm under the same settings is loaded or continued.
    """
    is_base = chosen.arm == "base"
    model, path = new_model(), folder / f"{chosen.name}.safetensors"
    made = settings.of_training(is_base)
    if path.exists():
        with safe_open(path, "pt") as file:
            saved = json.loads((file.metadata() or {}).get("settings", "{}"))
        check_same_run(saved, made, path)
        model.load_state_dict(load_file(path))
        return model.to(settings.device)
    if not is_base:
        model.load_state_dict(load_file(folder / "base.safetensors"))
    config = TrainConfig(
        objective="mdlm",
        block_length=BLOCK,
        steps=settings.base_steps if is_base else settings.steps,
        batch_size=settings.batch_size,
        optimizer="muon",
        muon_learning_rate=0.015 if is_base else 0.01,
        learning_rate=2e-3 if is_base else 1e-3,
        schedule="linear",
        decay_from=0.6,
        clip_norm=None,
        seed=chosen.seed,
        ops=settings.ops,
        save_every=500,
        keep=1,
    )
    examples = data.training_examples(chosen.arm, settings.examples, chosen.seed)
    fit(
        model,
        config,
        epochs(examples, config.batch_size, config.seed),
        folder / "runs" / chosen.name,
        data=f"{chosen.arm}: {settings.examples} problems of {data.NUM_MOVES} moves",
        eos_token_id=task.EOS_ID,
        save_model=lambda model, weights, path: save_weights(path / "model.safetensors", weights),
        group=Processes(0, 1, torch.device(settings.device)),
        title=chosen.name,
    )
    save_weights(path, model.state_dict(), {"settings": json.dumps(made)})
    return model.eval()


def save_weights(
    path: Path, weights: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    write_atomically(path, lambda file: save_file(kept, file, metadata))


def machine(device: str) -> str:
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{device_name(device)}, {versions}"


def outcome_path(folder: Path, chosen: Task) -> Path:
    return folder / "outcomes" / f"{chosen.name}.json"


def run_task(settings: Settings, folder: Path, chosen: Task) -> dict[str, Any]:
    """The outcome of a task, which is also kept in FOLDER/outcomes."""
    path = outcome_path(folder, chosen)
    if path.exists():
        outcome = json.loads(path.read_text("utf-8"))
        check_same_run(outcome["settings"], settings.of_outcome(), path)
        return outcome
    model = train(settings, chosen, folder)
    problems = task.evaluation_problems(settings.problems, data.NUM_MOVES)
    outcome = {
        "settings": asdict(settings),
        "made_with": machine(settings.device),
        **asdict(chosen),
        "cells": [
            evaluate(model, chosen, how, problems, settings) for how in decodings(chosen.arm)
        ],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_json(path, outcome)
    return outcome


def evaluate(
    model: Any,
    chosen: Task,
    how: Decoding,
    problems: list[task.Problem],
    settings: Settings,
) -> dict[str, Any]:
    """Which problems are right, the passes of one, and how left-to-right the decoding was."""
    right: list[bool] = []
    steps: list[list[list[int]]] = []
    forwards = 0
    size = BATCHES[torch.device(settings.device).type]
    for begin in range(0, len(problems), size):
        batch = problems[begin : begin + size]
        output = decode(model, chosen.arm, how, batch, settings)
        for problem, answer in zip(batch, output.answers, strict=True):
            right.append(data.final_place(answer) == str(problem.places[-1]))
        if len(steps) < ORDERED:
            steps += commits(output)
        forwards = int(output.num_forwards[0])
    steps = steps[:ORDERED]
    flat = [[position for step in row for position in step] for row in steps]
    return {
        **asdict(how),
        "right": right,
        "forwards": forwards,
        "arness": sum(map(global_arness, flat)) / len(flat),
        "fair_arness": sum(map(fair_arness, steps)) / len(steps),
        "first_order": steps[0],
    }


def decode(
    model: Any, arm: str, how: Decoding, problems: list[task.Problem], settings: Settings
) -> GenerationOutput:
    prompts = [torch.tensor(data.prompt_ids(problem)) for problem in problems]
    generate: Any = partial(
        spd_generate,
        rule=ORDERS[how.order](how.tokens_per_step) if how.order in ORDERS else None,
        block_length=BLOCK,
        max_new_tokens=data.RESPONSE,
        eos_token_id=(),  # the response fills its length, as in training
        use_cache=False,
    )
    if how.order == "parallel":
        canvas = data.canvas_of(data.PATHS.get(arm, data.MOST_PATHS))
        generate = partial(nap_generate, canvas=canvas, tokens_per_step=how.tokens_per_step)
    return generate(model, prompts, logprobs=True, ops=settings.ops)


def commits(output: GenerationOutput) -> list[list[list[int]]]:
    """The positions that each step of each row decoded, as `commit_steps` has them of a trace."""
    assert output.step_map is not None
    rows = []
    for step_map in output.step_map.tolist():
        row: list[list[int]] = [[] for _ in range(max(step_map))]
        for position, step in enumerate(step_map):
            if step > 0:  # a tag is at no step
                row[step - 1].append(position)
        rows.append(row)
    return rows
