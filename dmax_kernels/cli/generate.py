"""``python -m dmax_kernels generate``: answers to prompts, by soft parallel decoding."""

from __future__ import annotations

import argparse
import json
import reprlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmax_kernels.cli.model_options import (
    add_decode_options,
    add_machine_options,
    add_prompt_options,
    given_options,
    machine,
)
from dmax_kernels.decoding import CommittedBlock, GenerationOutput, spd_generate
from dmax_kernels.files import check_output, read_jsonl, read_lines, save_json

if TYPE_CHECKING:
    from dmax_kernels.models.pretrained import Loaded

DESCRIPTION = """\
Decodes prompts with a diffusion language model that has LLaDA2's interface, several tokens per
forward pass, and prints the answers; counts and speed go to stderr.

  python -m dmax_kernels generate --model Zigeng/DMax-Math-16B --device cuda \\
      --prompt "How many primes are there below 30?"
  python -m dmax_kernels generate --model oput --trace out.html \\
      --prompt "s4 u1 s1 u1 s6 d1 s2 d1 s3 u2 s5 d1 start 2 ="

MODEL is
  - Zigeng/DMax-16B, Zigeng/DMax-Math-16B, Zigeng/DMax-Coder-16B or inclusionAI/LLaDA2.0-mini, whose
    special tokens and thresholds are known here (about 32 GB of weights in bfloat16 each),
  - any other name on the Hugging Face hub, or a local folder; its own code is run, and an option
    must give what its config does not (mask token, eos),
  - base, oput or control: the small checkpoints of `demo`, which come with the package.

Several prompts are one batch: each goes on at its own pace and is answered as it would be alone,
except where the model's matrix products round differently at a different batch size.
"""
MAX_NEW_TOKENS = 256


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = DESCRIPTION
    add = parser.add_argument
    add("--model", required=True, help="a name or a folder, see above")
    add("--prompt", action="append", default=[], metavar="TEXT", help="may be given several times")
    add(
        "--prompt-file",
        type=Path,
        metavar="FILE",
        help="one prompt per line; in a .jsonl file, the field 'prompt' of each line",
    )
    add_prompt_options(parser)
    group = parser.add_argument_group("decoding (known models have some defaults of their own)")
    add_decode_options(group, defaults={"max_new_tokens": MAX_NEW_TOKENS})
    group = parser.add_argument_group("where it runs")
    add_machine_options(group)
    add = group.add_argument
    add("--batch-size", type=int, metavar="B", help="prompts at a time (default: all)")
    group = parser.add_argument_group("output")
    add = group.add_argument
    add("--stream", action="store_true", help="print each block as soon as it is committed")
    add("--trace", type=Path, metavar="FILE", help="write a page that plays the decoding back")
    add(
        "--logprobs",
        action="store_true",
        help="in the JSON, each token's log-probability and the step of its block that took it",
    )
    add("--json", metavar="FILE", help="write answers and counts as JSON; - for stdout")


def run(args: argparse.Namespace) -> int:
    prompts = read_prompts(args)
    if args.batch_size is not None and args.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {args.batch_size}")
    if args.json == "-" and args.stream:
        raise ValueError("--json must name a file where --stream prints to stdout, got -")
    if args.logprobs and args.json is None:
        raise ValueError("--logprobs must come with --json, which it adds to, got no --json")
    for option, path in (("--trace", args.trace), ("--json", args.json)):
        if path not in (None, "-"):
            check_output(option, Path(path))
    from dmax_kernels.models.pretrained import load_pretrained  # `--help` need not wait for it

    device, dtype = machine(args)
    loaded = load_pretrained(args.model, dtype=dtype, device=device)
    options = loaded.decode_options({"max_new_tokens": MAX_NEW_TOKENS, **given_options(args)})
    if loaded.defaults.note and options["rule"] == "spd":
        print(f"note: {args.model} was {loaded.defaults.note}", file=sys.stderr)
    pad_prompts = loaded.defaults.pad_prompts if args.pad_prompts is None else args.pad_prompts
    encoded = encode_all(loaded, prompts, args.raw, pad_prompts)

    size = args.batch_size or len(prompts)
    records, runs = [], []
    for first in range(0, len(prompts), size):
        batch = encoded[first : first + size]
        stream = Stream(loaded.tokenizer, len(batch), first) if args.stream else None
        output = spd_generate(
            loaded.model,
            batch,
            on_block=stream,
            trace=args.trace is not None,
            logprobs=args.logprobs,
            **options,
        )
        records += answers(loaded, output, prompts[first : first + size])
        if args.trace is not None:
            runs += traced_runs(loaded, output, batch, first)
        print(summary(output), file=sys.stderr)
        statistics = output.statistics.as_dict()
        for record in records[first:]:
            record["batch"] = statistics
    report = {"model": args.model, "answers": records}
    if args.json == "-":
        print(json.dumps(report, indent=1))
    elif args.json is not None:
        save_json(Path(args.json), report)
    if args.trace is not None:
        from dmax_kernels.ring_walk.page import write_trace_page

        write_trace_page(runs, list(options["eos_token_id"]), args.trace)
    if args.json != "-" and not args.stream:
        print_answers(records)
    return 0


def read_prompts(args: argparse.Namespace) -> list[str]:
    prompts = list(args.prompt)
    path = args.prompt_file
    if path is not None:
        is_jsonl = path.suffix.lower() == ".jsonl"
        read = read_jsonl if is_jsonl else read_lines
        for place, line in read(path, "--prompt-file"):
            try:
                prompts.append(prompt_of(line, is_jsonl))
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from None
    if not prompts:
        raise ValueError("--prompt or --prompt-file must give at least one prompt, got none")
    return prompts


def prompt_of(line: Any, in_record: bool) -> str:
    """The prompt of a line, which the reader gives as text, as a record or as an error."""
    if isinstance(line, ValueError):
        raise line
    if not in_record:
        return line
    if not isinstance(line, dict) or not isinstance(line.get("prompt"), str):
        need = 'a JSON object with a text field "prompt"'
        raise ValueError(f"must be {need}, got {reprlib.repr(line)}")
    return line["prompt"]


def encode_all(loaded: Loaded, prompts: list[str], raw: bool, pad: bool) -> list[list[int]]:
    from dmax_kernels.models.prompt_ids import padding, prompt_ids

    pad_to = padding(loaded.tokenizer, loaded.defaults.block_length, pad)
    encoded = []
    for number, prompt in enumerate(prompts, 1):
        messages = [{"role": "user", "content": prompt}]
        try:
            encoded.append(prompt_ids(loaded.tokenizer, messages, raw=raw, pad_to=pad_to)[0])
        except ValueError as error:
            raise ValueError(f"prompt {number}: {error}") from None
    return encoded


class Stream:
    """Prints blocks as they are committed; with several rows, each line with its row."""

    def __init__(self, tokenizer: Any, rows: int, first: int) -> None:
        self.tokenizer, self.first = tokenizer, first
        self.ids: list[list[int]] = [[] for _ in range(rows)]
        self.printed = [0] * rows

    def __call__(self, block: CommittedBlock) -> None:
        row, alone = block.row, len(self.ids) == 1
        self.ids[row] += block.token_ids
        # Decode the whole answer, as a word may span two blocks, and print only what is new
        text = self.tokenizer.decode(self.ids[row], skip_special_tokens=True)
        if not block.finished:
            text = text.rstrip("\N{REPLACEMENT CHARACTER}")  # the first bytes of a character
        new = text[self.printed[row] :]
        self.printed[row] = len(text)
        if alone:
            print(new, end="\n" if block.finished else "", flush=True)
        else:
            end = " (end)" if block.finished else ""
            print(f"[{self.first + row + 1}] {new.strip()}{end}", flush=True)


def answers(loaded: Loaded, output: GenerationOutput, prompts: list[str]) -> list[dict[str, Any]]:
    records = []
    for row, (prompt, ids) in enumerate(zip(prompts, output.answers, strict=True)):
        records.append(
            {
                "prompt": prompt,
                "answer": loaded.tokenizer.decode(ids, skip_special_tokens=True),
                "token_ids": ids,
                "forwards": int(output.num_forwards[row]),
                "tokens_per_forward": len(ids) / int(output.num_forwards[row]),
                "promotions": output.promotions[row],
            }
        )
        for name in ("logprobs", "step_map"):
            values = getattr(output, name)
            if values is not None:
                records[-1][name] = values[row, : len(ids)].tolist()
    return records


def print_answers(records: list[dict[str, Any]]) -> None:
    for number, record in enumerate(records, 1):
        if len(records) > 1:
            print(f"[{number}] {record['prompt']}")
        print(record["answer"])


def traced_runs(
    loaded: Loaded, output: GenerationOutput, prompts: list[list[int]], first: int
) -> list[dict[str, Any]]:
    from dmax_kernels.ring_walk.page import trace_runs

    return trace_runs(output, prompts, loaded.tokenizer, first)


def summary(output: GenerationOutput) -> str:
    counts = output.statistics
    graph = f", {counts.captured_steps} CUDA graphs" if counts.captured_steps else ""
    if counts.capture_refusal:
        graph = f", no CUDA graph ({counts.capture_refusal})"
    return (
        f"{counts.tokens} tokens in {counts.row_forwards} denoising passes = "
        f"{counts.tokens_per_forward:.2f} per forward; {counts.tokens_per_second:.1f} tokens/s "
        f"({counts.prefill_seconds:.2f} s prefill, {counts.decode_seconds:.2f} s decoding, "
        f"{counts.forwards} batch passes{graph})"
    )
