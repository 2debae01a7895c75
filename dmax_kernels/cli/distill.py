"""``python -m dmax_kernels distill``: a model's own responses, to train it on."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dmax_kernels.cli.config_file import ConfigFile
from dmax_kernels.cli.model_options import (
    add_decode_options,
    add_machine_options,
    add_prompt_options,
    given_options,
    machine,
)
from dmax_kernels.files import check_input

DESCRIPTION = """\
A model answers prompts, and its complete answers become training data: the self-distillation from
which the paper trains (section 4.1). By default as there: confidence threshold 0.95, blocks of 32,
up to 2,048 tokens; an answer that does not end within these is dropped and counted.

  python -m dmax_kernels distill --model inclusionAI/LLaDA2.0-mini --data prompts.jsonl \\
      --output train.jsonl --batch-size 8
  python -m dmax_kernels train --model inclusionAI/LLaDA2.0-mini --data train.jsonl --output run

Prompts are records in JSON lines: {"prompt": "..."}, or {"messages": [...]}, of which an answer of
the assistant's at the end is left out. OUTPUT has the same records with the model's response, and
is what `train --data` reads. The other fields of a record stay.

Each batch is appended to OUTPUT.parts. The same command continues after an interruption, and writes
OUTPUT at the end. It may continue with another --batch-size, --ops, --device or number of
processes, and with nothing else. With --temperature the answers are samples; prompt n is sampled
with the seed --seed + n, whatever its batch and process are. A prompt that is there several times
then gets several answers.

Several processes, each with a model of its own:

  python -m dmax_kernels distill ... --processes 2                     # on this machine
  torchrun --nproc-per-node 8 -m dmax_kernels distill ...              # on any number of machines
                                                                       # that share a file system
"""
# What changes no token
FREE = ("ops", "cuda_graph", "poll_lag")
DEFAULTS: dict[str, Any] = {"max_new_tokens": 2048, "rule": "threshold", "tau_dec": 0.95}
CONFIG = ConfigFile(repeated=("logit_bias",))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.usage = "%(prog)s --model NAME --data JSONL --output JSONL [options]"
    parser.description = DESCRIPTION
    add = parser.add_argument
    CONFIG.add_option(parser)
    add("--model", required=True, help="a name or a folder, as `generate` takes it")
    add("--data", required=True, nargs="+", type=Path, metavar="JSONL", help="prompts")
    add("--output", required=True, type=Path, metavar="JSONL", help="training data")
    add("--prompt-field", default="prompt", metavar="NAME", help="the text's field (%(default)s)")
    add("--prompt-suffix", default="", metavar="TEXT", help="is put after every prompt")
    add_prompt_options(parser)
    group = parser.add_argument_group("decoding (a known model has its own special tokens)")
    add_decode_options(group, defaults=DEFAULTS)
    group = parser.add_argument_group("where it runs")
    add_machine_options(group, spread=False)
    group.add_argument(
        "--batch-size", type=int, default=32, metavar="B", help="prompts at a time (%(default)s)"
    )
    group.add_argument(
        "--processes",
        type=int,
        default=1,
        metavar="N",
        help="processes on this machine, on the GPUs in turn (%(default)s)",
    )
    group.add_argument("--threads", type=int, metavar="N", help="CPU threads of each process")


def run(args: argparse.Namespace) -> int:
    for option, value in (("batch-size", args.batch_size), ("processes", args.processes)):
        if value < 1:
            raise ValueError(f"--{option} must be at least 1, got {value}")
    if args.threads is not None and args.threads < 1:
        raise ValueError(f"--threads must be at least 1, got {args.threads}")
    rank, count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if count > 1 and args.processes > 1:
        raise ValueError(f"--processes must be 1 under torchrun, got {args.processes}")
    for path in args.data:
        check_input("--data", path)
    folder = args.output.with_name(args.output.name + ".parts")
    if args.output.is_dir() or (args.output.exists() and not folder.is_dir()):
        need = "a new file, or one that this command wrote"
        raise ValueError(f"--output must be {need}, got {args.output}")
    try:
        return distill_file(args, folder, rank, count)
    except KeyboardInterrupt:
        print(f"\ninterrupted; the same command continues from {folder}", file=sys.stderr)
        return 130
    except (ValueError, RuntimeError, OSError):
        if rank != 0:  # the first process reports it
            return 1
        raise


def distill_file(args: argparse.Namespace, folder: Path, rank: int, count: int) -> int:
    import torch  # imported here, as what follows: `--help` need not wait for them

    from dmax_kernels.models.prompt_file import fingerprint, read_prompts
    from dmax_kernels.models.workers import available_cores, run_tasks, with_models
    from dmax_kernels.training.distill import (
        Answer,
        Answering,
        AnswerLog,
        Counts,
        distill,
        write_training_data,
    )

    device, dtype = machine(args)
    if device == "auto":
        raise ValueError("--device must be one device, got auto")
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    prompts = read_prompts(args.data, "--data", field=args.prompt_field, suffix=args.prompt_suffix)
    options = {**DEFAULTS, **given_options(args)}
    settings = {
        **{name: value for name, value in options.items() if name not in FREE},
        **{"model": args.model, "dtype": args.dtype, "raw": args.raw, "pad": args.pad_prompts},
        "prompts": fingerprint(prompts),
    }
    settings = {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}
    log = AnswerLog(folder, settings, rank)
    threads = args.threads or max(1, available_cores() // args.processes)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    answering = Answering(prompts, options, raw=args.raw, pad=args.pad_prompts)
    setup = with_models(answering, {"model": args.model}, dtype=dtype, device=device)

    def answer_batches(batches: list[list[int]]) -> Iterator[list[Answer]]:
        workers = min(args.processes, max(len(batches), 1))
        for _, answers in run_tasks(setup, batches, workers=workers, threads=threads):
            yield answers

    distill(
        *(log, len(prompts), args.batch_size, answer_batches),
        rank=rank,
        count=count,
        progress=rank == 0,
    )
    if len(log.places()) < len(prompts):  # another process writes the output, when it is done
        return 0
    kept = write_training_data(args.output, prompts, log)
    counts = Counts().add(log.answers())
    print(
        f"wrote {args.output}: {kept} of {len(prompts)} prompts; dropped "
        f"{counts.incomplete} incomplete, {counts.too_long} too long for the model's context and "
        f"{counts.complete - kept} empty; {counts.tokens} tokens in {counts.forwards} forward "
        f"passes = {counts.tokens_per_forward:.2f} per forward"
    )
    return 0
