"""One run of the command: from its options to configuration, model, data and loop."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain
from pathlib import Path
from typing import Any

from dmax_kernels.files import check_input, read_jsonl
from dmax_kernels.models.attention_window import attention_window
from dmax_kernels.models.checkpoint import checkpoint_folder, write_like
from dmax_kernels.models.end_tokens import write_end_token_ids
from dmax_kernels.models.pretrained import Loaded, load_pretrained
from dmax_kernels.models.prompt_ids import padding
from dmax_kernels.training.config import TrainConfig, with_preset
from dmax_kernels.training.data import (
    Example,
    Examples,
    Stream,
    epochs,
    read_dataset,
    read_examples,
)
from dmax_kernels.training.loop import fit
from dmax_kernels.training.outputs import Checkpoints
from dmax_kernels.training.parallel import processes


@dataclass(frozen=True)
class RunOptions:
    """What is trained, on what and where: the command's options beside those of `TrainConfig`."""

    model: str | None = None
    data: Sequence[str | Path] | None = None
    dataset: str | None = None
    dataset_config: str | None = None
    split: str = "train"
    skip_malformed: bool = False
    max_length: int | None = None
    pad_prompts: bool | None = None
    mask_token_id: int | None = None
    device: str | None = None
    stop_after: int | None = None

    def __post_init__(self) -> None:
        if self.model is None:
            raise ValueError("--model must be given: the folder or the name of a checkpoint")
        if (self.data is None) == (self.dataset is None):
            got = "neither" if self.data is None else "both"
            raise ValueError(f"exactly one of --data and --dataset must be given, got {got}")
        if self.stop_after is not None and self.stop_after < 1:
            raise ValueError(f"--stop-after must be at least 1, got {self.stop_after}")
        for path in self.data or ():
            check_input("--data", Path(path))


def run_training(options: dict[str, Any], output: Path) -> list[dict[str, Any]]:
    """Trains as the options say and returns the metrics (on the first process).

    Args:
        options: the command's options, by name with '_'; only those that were given. `preset` may
            be among them.
    """
    options = with_preset(options)
    config = TrainConfig(**only_fields(TrainConfig, options))
    run = RunOptions(**only_fields(RunOptions, options))
    with processes(run.device) as group:
        loaded = load_model(run, config.attention)
        model = loaded.model
        config = agree_on_block_length(config, model.config, given="block_length" in options)
        examples = load_examples(run, config, loaded, progress=group.is_first)
        check_window(model.config, examples.longest_row(config.block_length, config.eos_tail))
        if config.steps is None:
            config = replace(config, steps=steps_of_epochs(config, len(examples)))
        if group.is_first:
            print(
                f"{examples.fingerprint}; {config.steps} steps of {config.batch_size} on "
                f"{group.count} x {group.device.type}",
                flush=True,
            )
        source = checkpoint_folder(run.model)
        metrics = fit(
            model,
            config,
            step_examples(examples, config),
            output,
            data=examples.fingerprint,
            begun_with={"model": str(run.model), "mask_token_id": model.config.mask_token_id},
            eos_token_id=loaded.eos_token_ids[0],
            save_model=lambda model, weights, path: write_like(
                source, model, loaded.tokenizer, weights, path
            ),
            group=group,
            stop_after=run.stop_after,
        )
        if group.is_first:
            newest = Checkpoints(output / "checkpoints", config.keep, group).newest()
            print(f"wrote {newest}, metrics.jsonl and loss.png")
    return metrics


def only_fields(dataclass_type: type, options: dict[str, Any]) -> dict[str, Any]:
    """The options that are fields of this class; the command line gives pairs as lists."""
    names = {item.name for item in fields(dataclass_type)}
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in options.items()
        if name in names
    }


def load_model(run: RunOptions, attention: str) -> Loaded:
    """The model whose config has the mask token and the end-of-sequence tokens that training uses.

    They are saved with every checkpoint, and the decoding loop looks for them there.
    """
    loaded = load_pretrained(
        run.model, attention="flex_attention" if attention == "flex" else "sdpa"
    )
    config = loaded.model.config
    candidates = (
        run.mask_token_id,
        getattr(config, "mask_token_id", None),
        loaded.defaults.mask_token_id,
        loaded.tokenizer.mask_token_id,
    )
    mask_token_id = next((token for token in candidates if token is not None), None)
    vocabulary = vocabulary_of(loaded.model)
    if mask_token_id is not None and not 0 <= mask_token_id < vocabulary:
        raise ValueError(f"mask_token_id must be in [0, {vocabulary}), got {mask_token_id}")
    config.mask_token_id = mask_token_id
    if not loaded.eos_token_ids:
        raise ValueError("the tokenizer must have an end-of-sequence token, got none")
    write_end_token_ids(loaded.model, loaded.eos_token_ids)
    return loaded


def vocabulary_of(model: Any) -> int:
    return model.get_input_embeddings().weight.shape[0]


def agree_on_block_length(config: TrainConfig, model_config: Any, given: bool) -> TrainConfig:
    """Takes the block length from the model, or, where one was given, writes it there."""
    if getattr(model_config, "block_length", None) is None:
        return config
    if not given:
        return replace(config, block_length=model_config.block_length)
    model_config.block_length = config.block_length
    return config


def load_examples(
    run: RunOptions, config: TrainConfig, loaded: Loaded, *, progress: bool
) -> Examples:
    """Reads the data; with `progress`, shows it and says how many records were skipped."""
    max_length = run.max_length
    context = getattr(loaded.model.config, "max_position_embeddings", None)
    if context is not None:
        longest = context - 2 * config.block_length + 1  # leaves room for the tail
        max_length = longest if max_length is None else min(max_length, longest)
    if run.data is not None:
        records = chain.from_iterable(read_jsonl(Path(path)) for path in run.data)
    else:
        records = read_dataset(run.dataset, run.dataset_config, run.split)
    pad = loaded.defaults.pad_prompts if run.pad_prompts is None else run.pad_prompts
    examples, skipped = read_examples(
        records,
        loaded.tokenizer,
        pad_to=padding(loaded.tokenizer, config.block_length, pad),
        eos_token_id=loaded.eos_token_ids,
        vocab_size=vocabulary_of(loaded.model),
        max_length=max_length,
        skip_malformed=run.skip_malformed,
        progress=progress,
    )
    if skipped and progress:
        counts = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
        print(f"skipped records: {counts}", flush=True)
    return examples


def check_window(model_config: Any, longest_row: int) -> None:
    """Refuses rows that are longer than the model's sliding window.

    transformers passes a 4-D mask to every layer as it is, and the training mask has no window: the
    model would be trained with attention that it does not have when it decodes.
    """
    window = attention_window(model_config)
    if window is not None and longest_row > window:
        raise ValueError(
            f"training rows must fit in the model's attention window of {window} positions, which "
            f"the training mask does not have, got one of {longest_row}: lower --max-length"
        )


def steps_of_epochs(config: TrainConfig, num_examples: int) -> int:
    batches = math.ceil(config.epochs * num_examples / config.batch_size)
    return batches * (2 if config.passes == "alternating" else 1)


def step_examples(examples: Examples, config: TrainConfig) -> Stream:
    """The examples of each step; two steps with alternating passes share the same ones."""
    batches = epochs(examples, config.batch_size, config.seed)
    if config.passes != "alternating":
        return batches

    def stream(first_step: int) -> Iterator[list[Example]]:
        for index, batch in enumerate(batches(first_step // 2), first_step // 2):
            if 2 * index >= first_step:
                yield batch  # for the masked pass; a run may resume at the predicted one
            yield batch

    return stream
