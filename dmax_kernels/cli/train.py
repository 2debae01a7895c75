"""`python -m dmax_kernels train`: On-Policy Uniform Training of a block-diffusion model."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from dmax_kernels.cli.config_file import ConfigFile
from dmax_kernels.cli.options import add_option
from dmax_kernels.training.config import PRESETS, TrainConfig

EPILOG = """
examples:
  # fine-tune a checkpoint on conversations with the paper's settings
  python -m dmax_kernels train --model LLaDA2.0-mini --data math.jsonl --output run \\
      --precision bf16-master --attention flex --gradient-checkpointing --micro-batch-size 1
  # the same on 8 GPUs: torchrun starts the processes, and FSDP2 shards the model
  torchrun --nproc-per-node 8 -m dmax_kernels train --model ... --data ... --output run
  # make the shipped tiny checkpoints from scratch (with --ops reference by default)
  python -m dmax_kernels train --config ring_walk --output ring_walk_checkpoints
  # or, from the shipped base, every method at several lengths and seeds (an hour and a half of one
  # CPU core), and what each of them decodes
  python -m dmax_kernels train --config ring_walk_ladder --output ring_walk_ladder --workers 2

data: one record per line, in either form,
  {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
  {"prompt": "...", "response": "..."}
Text goes through the tokenizer's chat template. The last assistant message is learnt; everything
before it is the prompt, which is never masked. Records without a response and records that are too
long are skipped and counted. A record that is malformed, or that the chat template refuses, stops
the command before training starts.

output: OUTPUT/checkpoints/step-0000000N (Hugging Face folders, for from_pretrained and for
load_checkpoint), metrics.jsonl and loss.png. The same command on the same folder continues from the
newest checkpoint and gives the losses of an uninterrupted run.

Any causal LM that the decoding loop can load can be trained: it needs logits that are not shifted
against the tokens, a 4-D attention mask, position ids and a mask token. Before the first step the
model is run on a few tokens to check that it follows the mask and the positions, and that its
logits are its hidden states times one weight.
"""

SECTIONS = {
    "objective": (
        "objective",
        "passes",
        "share_masks",
        "mask_ratio",
        "mask_level",
        "mask_weight",
        "loss_average",
        "rollout_temperature",
        "certainty_beta",
        "certainty_temperature",
        "block_length",
        "shifted_logits",
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
        "warmup_fraction",
        "decay_from",
        "decay_to",
        "clip_norm",
    ),
    "speed and memory": ("precision", "attention", "loss_from", "gradient_checkpointing", "ops"),
    "checkpoints": ("save_every", "keep"),
}
RECIPE = "ring_walk"
LADDER = "ring_walk_ladder"
GSM = "gsm"
ONLY_GSM = ("small", "base", "base_steps", "base_scale", "scale", "export")
# What each of them takes, and its --output by default
RECIPES = {
    RECIPE: (("config", "output", "ops", "threads"), "ring_walk_checkpoints"),
    LADDER: (("config", "output", "ops", "threads", "device", "workers"), LADDER),
    GSM: (
        ("config", "data", "output", "ops", "threads", "device", "workers", *ONLY_GSM),
        "gsm_checkpoints",
    ),
}
CONFIG = ConfigFile(
    {
        RECIPE: "the shipped recipe, which takes --output, --ops and --threads",
        LADDER: "trainings of several lengths, which takes --device and --workers too",
        GSM: "the recipe of word problems (docs/guide.md), from --data that gsm.problems wrote",
    }
)
OUTPUT = "dmax_training"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options without defaults: only those that were given are in the result."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.argument_default = argparse.SUPPRESS
    parser.usage = "%(prog)s --model NAME_OR_FOLDER --data JSONL --output FOLDER [options]"
    parser.epilog = EPILOG
    data = parser.add_argument_group("model and data")
    CONFIG.add_option(data)
    data.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        help="the settings in which the paper's text and the authors' released configuration "
        "differ, as the one or the other has them (docs/guide.md lists them); any option overrides "
        "its own",
    )
    data.add_argument(
        "--model",
        help="a name on the Hugging Face hub, the folder of a checkpoint, or base, oput or control",
    )
    data.add_argument("--data", nargs="+", type=Path, metavar="JSONL", help="conversations")
    data.add_argument("--dataset", help="or a Hugging Face dataset (needs the package 'datasets')")
    data.add_argument("--dataset-config", help="configuration of the dataset")
    data.add_argument("--split", help="split of the dataset (default: train)")
    data.add_argument(
        "--skip-malformed",
        action=argparse.BooleanOptionalAction,
        help="skip and count malformed records instead of stopping",
    )
    data.add_argument(
        "--max-length",
        type=int,
        help="tokens of prompt and response above which a record is skipped (default: what fits in "
        "the model's context)",
    )
    data.add_argument(
        "--pad-prompts",
        action=argparse.BooleanOptionalAction,
        help="pad prompts on the left to whole blocks, where the tokenizer has no chat template "
        "(default: for base, oput and control, which were trained so)",
    )
    data.add_argument("--mask-token-id", type=int, help="the mask token (default: the model's)")
    data.add_argument(
        "--output",
        type=Path,
        help=f"folder of the run (default: {OUTPUT}, {RECIPES[RECIPE][1]} with {RECIPE}, "
        f"{RECIPES[LADDER][1]} with {LADDER}, or {RECIPES[GSM][1]} with {GSM})",
    )
    options = {item.name: item for item in fields(TrainConfig)}
    for title, names in SECTIONS.items():
        group = parser.add_argument_group(title)
        for name in names:
            add_option(group, options[name], options[name].default)
    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--device", choices=("cuda", "cpu"), help="default: cuda if there is a GPU"
    )
    machine.add_argument(
        "--threads",
        type=int,
        help=f"CPU threads (default: torch's, or 1 with {RECIPE}, {LADDER} and {GSM}, whose "
        "matrices are so small that several threads mostly wait for each other)",
    )
    machine.add_argument(
        "--workers",
        type=int,
        help=f"with {LADDER} and {GSM}: processes that train side by side, on one GPU too "
        "(default: 1)",
    )
    machine.add_argument(
        "--stop-after",
        type=int,
        help="stop after this many steps in all, with a checkpoint; the same command without this "
        "option continues",
    )
    gsm = parser.add_argument_group(f"only with --config {GSM}")
    gsm.add_argument(
        "--small",
        action="store_true",
        help="for a CPU: a sixth of the parameters, half the batch (for --data of few templates, "
        "see `gsm.problems --below`)",
    )
    gsm.add_argument("--base", type=Path, metavar="DIR", help="a base model of an earlier run")
    gsm.add_argument("--base-steps", type=int, metavar="N", help="its further steps (default: 0)")
    gsm.add_argument(
        "--base-scale", type=float, metavar="X", help="multiplies the base's steps (default: 1)"
    )
    gsm.add_argument("--scale", type=float, metavar="X", help="multiplies all steps (default: 1)")
    gsm.add_argument(
        "--export",
        type=Path,
        metavar="DIR",
        help="where models, log and rows go (default: --output)",
    )


def run(args: argparse.Namespace) -> int:
    """Returns the exit status. ValueError, RuntimeError and OSError are faults a user can fix."""
    options = {name: value for name, value in vars(args).items() if name not in ("run", "command")}
    recipe = options["config"] if options.get("config") in RECIPES else None
    if recipe not in (LADDER, GSM) and "workers" in options:
        need = f"go with --config {LADDER} or {GSM}"
        raise ValueError(f"--workers must {need}, got {options['workers']}")
    for name in ONLY_GSM:
        if recipe != GSM and name in options:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} must go with --config {GSM}, got {options[name]}")
    output = options.get("output", Path(RECIPES[recipe][1] if recipe else OUTPUT))
    threads = options.get("threads", 1 if recipe else None)
    for name in ("threads", "workers"):
        if options.get(name) is not None and options[name] < 1:
            raise ValueError(f"--{name} must be at least 1, got {options[name]}")
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output must be a folder, got the file {output}")
    try:
        # Imported here because transformers takes seconds to import, which `--help` can do without
        import torch

        if threads is not None:
            torch.set_num_threads(threads)
        if recipe:
            check_recipe(options, recipe)
            train = {RECIPE: run_recipe, LADDER: run_ladder, GSM: run_gsm}[recipe]
            return train(options, output, threads)
        from dmax_kernels.training.run import run_training

        run_training(options, output)
    except KeyboardInterrupt:
        print(f"\ninterrupted; the same command continues from {output}", file=sys.stderr)
        return 130
    except (ValueError, RuntimeError, OSError):
        if os.environ.get("RANK", "0") != "0":  # the first process reports it
            return 1
        raise
    return 0


def check_recipe(options: dict[str, Any], recipe: str) -> None:
    taken = RECIPES[recipe][0]
    refused = [name for name in options if name not in taken]
    if refused:
        flag = "--" + refused[0].replace("_", "-")
        flags = [f"--{name.replace('_', '-')}" for name in taken[1:]]
        flags = f"{', '.join(flags[:-1])} and {flags[-1]}"
        raise ValueError(f"--config {recipe} takes {flags}, got {flag}")


def run_recipe(options: dict[str, Any], output: Path, threads: int) -> int:
    from dmax_kernels.ring_walk import recipe

    ops = options.get("ops", "reference")
    command = f"python -m dmax_kernels train --config {RECIPE} --ops {ops} --threads {threads}"
    recipe.run_recipe(output, ops=ops, command=command)
    print(f"wrote {output}/base, oput, control and training_log.json")
    return 0


def run_ladder(options: dict[str, Any], output: Path, threads: int) -> int:
    from dmax_kernels.ring_walk import ladder, record

    device, workers = options.get("device", "cpu"), options.get("workers", 1)
    ops = options.get("ops", "reference")
    arms = ladder.all_arms()
    for arm in ladder.train_ladder(output, arms, device=device, ops=ops, workers=workers):
        print(f"{arm.name} is trained", flush=True)
    record.write_record(output, arms, workers=workers)
    print(f"wrote {output}/ladder.json, and {len(arms)} checkpoints beside it")
    return 0


def run_gsm(options: dict[str, Any], output: Path, threads: int) -> int:
    from dmax_kernels.gsm import command

    return command.run(options, output, threads)
