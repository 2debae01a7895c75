"""`python -m dmax_kernels train`: On-Policy Uniform Training of a block-diffusion model."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from dmax_kernels.cli.options import add_option
from dmax_kernels.files import read_json
from dmax_kernels.training.config import TrainConfig

EPILOG = """
examples:
  # fine-tune a checkpoint on conversations: paper's settings, loss and rollout on the kernels
  python -m dmax_kernels train --model LLaDA2.0-mini --data math.jsonl --output run \\
      --precision bf16-master --attention flex --gradient-checkpointing --micro-batch-size 1
  # the same over 8 GPUs; torchrun starts the processes, FSDP2 shards the model
  torchrun --nproc-per-node 8 -m dmax_kernels train --model ... --data ... --output run
  # the shipped tiny checkpoints, from nothing (--ops reference unless given)
  python -m dmax_kernels train --config ring_walk --output ring_walk_checkpoints

data: one record a line,
  {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
  {"prompt": "...", "response": "..."}
Text goes through the tokenizer's chat template. The last assistant message is learnt, the rest is
the prompt, which is never masked. A record without a response, or too long, is skipped and counted;
one that is malformed, or that the chat template refuses, stops the command before training starts.

output: OUTPUT/checkpoints/step-0000000N (Hugging Face folders: load_checkpoint, from_pretrained),
metrics.jsonl, loss.png. The same command on the same folder goes on from the newest checkpoint and
gives the losses of an uninterrupted run.

Any causal LM can be trained that the decoding loop loads: no shift between logits and tokens, a 4-D
attention mask, position ids, a mask token. A few tokens are run before the first step to see that
the model follows mask and positions, and how its logits follow from its hidden states.
"""

SECTIONS = {
    "objective": (
        "objective",
        "passes",
        "mask_ratio",
        "rollout_temperature",
        "block_length",
        "eos_tail",
    ),
    "steps": ("steps", "epochs", "batch_size", "micro_batch_size", "seed"),
    "optimizer": (
        "optimizer",
        "learning_rate",
        "muon_learning_rate",
        "weight_decay",
        "betas",
        "schedule",
        "warmup_steps",
        "decay_from",
        "clip_norm",
    ),
    "speed and memory": ("precision", "attention", "loss_from", "gradient_checkpointing", "ops"),
    "checkpoints": ("save_every", "keep"),
}
RECIPE = "ring_walk"
RECIPE_OPTIONS = ("config", "output", "ops", "threads")
OUTPUT = "dmax_training"
RECIPE_OUTPUT = "ring_walk_checkpoints"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options without a default of their own: only those that were given are in the result."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.argument_default = argparse.SUPPRESS
    parser.usage = "%(prog)s --model NAME_OR_FOLDER --data JSONL --output FOLDER [options]"
    parser.epilog = EPILOG
    where = parser.add_argument_group("what to train, on what")
    where.add_argument(
        "--config",
        metavar="FILE",
        help="JSON file of the options here ('_' for '-'), which those on the command line "
        f"override; or {RECIPE}: the shipped recipe, which takes --output, --ops, --threads",
    )
    where.add_argument(
        "--model",
        help="a name on the Hugging Face hub or a folder of a checkpoint, or base, oput, control",
    )
    where.add_argument("--data", nargs="+", type=Path, metavar="JSONL", help="conversations")
    where.add_argument("--dataset", help="instead: a Hugging Face dataset (needs 'datasets')")
    where.add_argument("--dataset-config", help="its configuration")
    where.add_argument("--split", help="its split (default: train)")
    where.add_argument(
        "--skip-malformed",
        action=argparse.BooleanOptionalAction,
        help="skip and count malformed records",
    )
    where.add_argument(
        "--max-length",
        type=int,
        help="skip longer records; tokens of prompt and response (default: the model's context)",
    )
    where.add_argument("--mask-token-id", type=int, help="where the model's config has none")
    where.add_argument(
        "--output",
        type=Path,
        help=f"folder of the run (default: {OUTPUT}; {RECIPE}: {RECIPE_OUTPUT})",
    )
    options = {item.name: item for item in fields(TrainConfig)}
    for title, names in SECTIONS.items():
        group = parser.add_argument_group(title)
        for name in names:
            add_option(group, options[name], options[name].default)
    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--device", choices=("cuda", "cpu"), help="(default: cuda where there is one)"
    )
    machine.add_argument(
        "--threads",
        type=int,
        help=f"CPU threads ({RECIPE}: 1; its matrices are small, and threads that wait for each "
        "other on a busy machine make it many times slower)",
    )
    machine.add_argument(
        "--stop-after",
        type=int,
        help="leave off after so many steps in all, with a checkpoint; the same command goes on",
    )


def run(args: argparse.Namespace) -> int:
    """Returns the exit status. What a user can mend is a ValueError, RuntimeError or OSError."""
    given = {name: value for name, value in vars(args).items() if name not in ("run", "command")}
    recipe = given.get("config") == RECIPE
    if "config" in given and not recipe:
        given = {**read_config(Path(given["config"])), **given}
    output = given.get("output", Path(RECIPE_OUTPUT if recipe else OUTPUT))
    threads = given.get("threads", 1 if recipe else None)
    if threads is not None and threads < 1:
        raise ValueError(f"--threads must be at least 1, got {threads}")
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output must be a folder, got the file {output}")
    try:
        # Imported here: transformers takes seconds that `--help` need not.
        import torch

        if threads is not None:
            torch.set_num_threads(threads)
        if recipe:
            return run_recipe(given, output, threads)
        from dmax_kernels.training.run import run_training

        run_training(given, output)
    except KeyboardInterrupt:
        print(f"\ninterrupted; the same command goes on from {output}", file=sys.stderr)
        return 130
    except (ValueError, RuntimeError, OSError):
        if os.environ.get("RANK", "0") != "0":  # the first process says it
            return 1
        raise
    return 0


def run_recipe(given: dict[str, Any], output: Path, threads: int) -> int:
    from dmax_kernels.ring_walk import recipe

    other = [name for name in given if name not in RECIPE_OPTIONS]
    if other:
        flag = "--" + other[0].replace("_", "-")
        raise ValueError(f"--config {RECIPE} takes --output, --ops and --threads, got {flag}")
    ops = given.get("ops", "reference")
    command = f"python -m dmax_kernels train --config {RECIPE} --ops {ops} --threads {threads}"
    recipe.run_recipe(output, ops=ops, command=command)
    print(f"wrote {output}/base, oput, control and training_log.json")
    return 0


class ConfigParser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise ValueError(message)


def read_config(path: Path) -> dict[str, Any]:
    """A configuration file's options, checked as those of the command line are."""
    if not path.exists():
        raise ValueError(f"--config must be {RECIPE} or a JSON file, got no file {path}")
    values = read_json(path, "--config")
    if not isinstance(values, dict):
        raise ValueError(f"--config {path} must hold an object, got {type(values).__name__}")
    arguments = []
    for name, value in values.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(flag if value else f"--no-{flag[2:]}")
        elif value is not None:
            words = value if isinstance(value, list) else [value]
            arguments += [flag, *map(str, words)]
    parser = ConfigParser(add_help=False, allow_abbrev=False)
    add_arguments(parser)
    try:
        return vars(parser.parse_args(arguments))
    except ValueError as error:
        raise ValueError(f"--config {path}: {error}") from None
