"""Where a run of the recipe reads and writes, and how it trains one stage."""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from dmax_kernels.files import write_atomically
from dmax_kernels.gsm import task
from dmax_kernels.gsm.bundle import Bundle, load_half
from dmax_kernels.gsm.stages import Recipe
from dmax_kernels.ring_walk.data import repeated_examples, stream_of
from dmax_kernels.ring_walk.recipe import new_model, stage_log
from dmax_kernels.ring_walk.stages import Stage
from dmax_kernels.training.data import Example
from dmax_kernels.training.loop import fit
from dmax_kernels.training.parallel import Processes


@dataclass(frozen=True)
class Place:
    """Where a run reads and writes, and on what it computes; each process has its own copy."""

    data: Path
    output: Path
    export: Path  # for the float16 weights, the log and the rows
    device: str
    ops: str
    recipe: Recipe
    base: Path | None = None  # the folder of a base model, see `bundle.py`, from which it starts

    @cached_property
    def splits(self) -> dict[str, list[dict[str, Any]]]:
        return task.read_problems(self.data)

    @cached_property
    def data_crc(self) -> int:
        return zlib.crc32(self.data.read_bytes())

    @cached_property
    def words(self) -> list[str]:
        """The vocabulary of all that the base model may learn from; the others are <unk>."""
        if self.base is not None:
            return Bundle.open(self.base).words
        records = [*self.splits["train"], *self.splits["distill"]]
        return task.words_of(record[name] for record in records for name in ("prompt", "response"))

    @cached_property
    def vocabulary(self) -> task.Words:
        return task.Words.of(self.words)

    @cached_property
    def tokenizer(self) -> Any:
        return task.build_tokenizer(self.words)

    @property
    def options(self) -> dict[str, Any]:
        """The options of `spd_generate` that are the same everywhere."""
        return {
            "block_length": task.BLOCK,
            "max_new_tokens": task.MAX_NEW_TOKENS,
            "eos_token_id": (task.EOS_ID,),
            "ops": self.ops,
            "cuda_graph": False,  # whose captures cost more than they save in so short runs
        }

    def build_model(self, block_length: int = task.BLOCK) -> nn.Module:
        return task.build_model(len(self.words), block_length, **self.recipe.sizes)

    def new_model(self, stage: Stage) -> nn.Module:
        start_from = None if stage.start_from is None else self.weights(stage.start_from)
        return new_model(stage, start_from, self.build_model)

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        return safetensors.torch.load_file(self.output / "weights" / f"{name}.safetensors")

    def model(self, name: str) -> nn.Module:
        """A trained model as it is exported, ready to decode."""
        model = self.build_model()
        load_half(model, self.export / f"{name}.safetensors")
        return model.to(self.device).eval()

    def examples(self, records: list[dict[str, Any]]) -> list[Example]:
        encode = self.vocabulary
        return [
            Example(
                tuple(encode.prompt(record)),
                tuple(encode.response(record)),
                f"template {record['template']}",
            )
            for record in records
        ]

    def train(self, stage: Stage, examples: list[Example]) -> dict[str, Any]:
        """Runs or continues the stage and writes its weights; returns what the log has of it."""
        on_gpu = self.device.startswith("cuda")
        precision = "bf16-autocast" if on_gpu else "float32"
        config = replace(stage.config, ops=self.ops, precision=precision)
        stage = replace(stage, config=config)
        source = partial(repeated_examples, examples, config.seed)
        model = self.new_model(stage)
        metrics = fit(
            model,
            config,
            stream_of(source, task.BLOCK, config.batch_size),
            self.output / "stages" / stage.name,
            data=f"{stage.data}, {len(examples)} examples, file crc {self.data_crc:08x}",
            eos_token_id=task.EOS_ID,
            save_model=partial(save_weights, stage.name),
            group=Processes(0, 1, torch.device(self.device)),
            title=stage.name,
        )
        weights = {name: value.cpu() for name, value in model.state_dict().items()}
        log = logged(stage, metrics)
        self.write_weights(stage.name, weights, {"stage": json.dumps(log)})
        return log

    def write_weights(
        self, name: str, weights: dict[str, torch.Tensor], metadata: dict[str, str]
    ) -> None:
        written = {self.output / "weights": weights}
        if name in self.recipe.models:
            written[self.export] = {key: value.half() for key, value in weights.items()}
        for folder, values in written.items():
            save = partial(safetensors.torch.save_file, values, metadata=metadata)
            write_atomically(folder / f"{name}.safetensors", save)


def save_weights(name: str, model: Any, weights: dict[str, torch.Tensor], folder: Path) -> None:
    safetensors.torch.save_file(weights, folder / f"{name}.safetensors")


def logged(stage: Stage, metrics: list[dict[str, Any]]) -> dict[str, Any]:
    times = sorted(row["seconds"] for row in metrics)
    return {
        **stage_log(stage, metrics),
        "median_step_seconds": round(times[len(times) // 2], 5),
        "peak_memory": metrics[-1]["peak_memory"],
    }
