"""One run of the command: options to configuration, model, data, loop."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields, replace
from itertools import chain
from pathlib import Path
from typing import Any

from dmax_kernels.files import check_input, read_jsonl
from dmax_kernels.models.checkpoint import checkpoint_folder, write_like
from dmax_kernels.models.end_tokens import write_end_token_ids
from dmax_kernels.models.pretrained import load_pretrained
from dmax_kernels.training.outputs import Checkpoints
from dmax_kernels.training.config import TrainConfig
from dmax_kernels.training.data import Examples, Records, epochs, read_dataset, read_examples
from dmax_kernels.training.loop import fit
from dmax_kernels.training.parallel import Processes, processes


def run_training(given: dict[str, Any], output: Path) -> list[dict[str, Any]]:
    """Trains as the options say and returns the metrics (of the first process).

    Args:
        given: the command's options, by name with '_'; only those that were given.
    """
    names = {item.name for item in fields(TrainConfig)}
    config = TrainConfig(
        **{
            name: tuple(value) if isinstance(value, list) else value
            for name, value in given.items()
            if name in names
        }
    )
    if "model" not in given:
        raise ValueError("--model must be given: a folder of a Hugging Face checkpoint")
    if ("data" in given) == ("dataset" in given):
        raise ValueError("--data or --dataset must be given, one of them")
    stop_after = given.get("stop_after")
    if stop_after is not None and stop_after < 1:
        raise ValueError(f"--stop-after must be at least 1, got {stop_after}")
    for path in given.get("data", []):  # before a large model is loaded
        check_input("--data", Path(path))
    with processes(given.get("device")) as group:
        config, model, tokenizer, ends = load_model(given, config)
        examples = load_examples(given, config, model, tokenizer, ends, group)
        source = checkpoint_folder(given["model"])
        config = with_steps(config, len(examples))
        stream = epochs(examples, config.batch_size, config.seed)
        if config.passes == "alternating":
            stream = twice(stream)
        if group.is_first:
            print(
                f"{examples.fingerprint}; {config.steps} steps of {config.batch_size} on "
                f"{group.count} x {group.device.type}",
                flush=True,
            )
        metrics = fit(
            model,
            config,
            stream,
            output,
            data=examples.fingerprint,
            eos_token_id=ends[0],
            save_model=lambda model, weights, path: write_like(
                source, model, tokenizer, weights, path
            ),
            group=group,
            stop_after=stop_after,
        )
        if group.is_first:
            newest = Checkpoints(output / "checkpoints", config.keep, group).newest()
            print(f"wrote {newest}, metrics.jsonl and loss.png")
    return metrics


def load_model(
    given: dict[str, Any], config: TrainConfig
) -> tuple[TrainConfig, Any, Any, tuple[int, ...]]:
    """Model, tokenizer and end-of-sequence ids; the block length from the model unless given.

    What was given is written into the model's config, where the decoding loop looks for it.
    """
    attention = "flex_attention" if config.attention == "flex" else "sdpa"
    loaded = load_pretrained(given["model"], attention=attention)
    model, tokenizer = loaded.model, loaded.tokenizer
    known = getattr(model.config, "block_length", None)
    if "block_length" not in given and known is not None:
        config = replace(config, block_length=known)
    if known is not None:
        model.config.block_length = config.block_length
    vocabulary = model.get_input_embeddings().weight.shape[0]
    mask = given.get("mask_token_id", getattr(model.config, "mask_token_id", None))
    if mask is None:
        mask = loaded.defaults.mask_token_id
    if mask is None:
        mask = tokenizer.mask_token_id
    if mask is not None and not 0 <= mask < vocabulary:
        raise ValueError(f"mask_token_id must be in [0, {vocabulary}), got {mask}")
    model.config.mask_token_id = mask
    ends = loaded.eos_token_ids
    if not ends:
        raise ValueError("the tokenizer must have an end-of-sequence token, got none")
    write_end_token_ids(model, ends)
    return config, model, tokenizer, ends


def load_examples(
    given: dict[str, Any],
    config: TrainConfig,
    model: Any,
    tokenizer: Any,
    ends: tuple[int, ...],
    group: Processes,
) -> Examples:
    max_length = given.get("max_length")
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None:  # less what the tail may add
        room = context - 2 * config.block_length + 1
        max_length = room if max_length is None else min(max_length, room)
    examples, skipped = read_examples(
        records(given),
        tokenizer,
        eos_token_id=ends,
        vocab_size=model.get_input_embeddings().weight.shape[0],
        max_length=max_length,
        skip_malformed=given.get("skip_malformed", False),
        progress=group.is_first,
    )
    if skipped and group.is_first:
        counts = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
        print(f"skipped records: {counts}", flush=True)
    return examples


def records(given: dict[str, Any]) -> Records:
    if "data" in given:
        return chain.from_iterable(read_jsonl(Path(path)) for path in given["data"])
    return read_dataset(given["dataset"], given.get("dataset_config"), given.get("split", "train"))


def with_steps(config: TrainConfig, num_examples: int) -> TrainConfig:
    """The number of steps from that of epochs, where it was not given."""
    if config.steps is not None:
        return config
    batches = math.ceil(config.epochs * num_examples / config.batch_size)
    return replace(config, steps=batches * (2 if config.passes == "alternating" else 1))


def twice(stream: Any) -> Any:
    """Each batch for two steps in turn: one for the masked pass, one for the predicted."""

    def alternating(first: int) -> Iterator[Any]:
        for index, batch in enumerate(stream(first // 2), first // 2):
            if 2 * index >= first:
                yield batch
            yield batch

    return alternating
