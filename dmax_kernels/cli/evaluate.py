"""``python -m dmax_kernels evaluate``: accuracy against parallelism, on problems with answers."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmax_kernels.cli.config_file import ConfigFile
from dmax_kernels.cli.model_options import (
    add_decode_options,
    add_machine_options,
    add_prompt_options,
    given_options,
    machine,
)
from dmax_kernels.files import check_input, check_output, save_json, write_text

if TYPE_CHECKING:
    from dmax_kernels.evaluation.cells import Cell, Outcome
    from dmax_kernels.evaluation.run import Evaluation
    from dmax_kernels.models.prompt_file import Prompt

DESCRIPTION = """\
Answers problems with models and decoding rules, and prints for each of them accuracy, tokens per
forward pass (mean of ratios and ratio of sums, with and without the end-of-sequence token), forward
passes per block and tokens per second; accuracy under parallelism (AUP) of each rule over its
thresholds; and intervals for the differences from one row, paired by problem.

  # what `demo` shows, from the shipped models
  python -m dmax_kernels evaluate --model base --model oput --data ring_walk \\
      --rule threshold:0.95,0.5 --rule spd:0.5,0 --picture rows.png
  # the paper's Table 1, zero-shot: two of its rows, and a third by the model's own rule
  python -m dmax_kernels evaluate --model inclusionAI/LLaDA2.0-mini --data gsm8k_test.jsonl \\
      --prompt-field question --prompt-suffix $'\\nLet\\'s think step by step\\n' \\
      --rule threshold:0.95 --rule hierarchical:0.95 --json base.json
  python -m dmax_kernels evaluate --model Zigeng/DMax-Math-16B --data gsm8k_test.jsonl ...

Problems are records in JSON lines: a prompt, as `distill` reads it, and the right "answer". A
response is right if the answer that is extracted from it is the same text or the same number. By
default the last number of a text is its answer, in the response as in the record.

  --extract '#### (\\S+)'       the first group of a regular expression's last match
  --extract my_module:find     or a function, from the response's text to its answer or None
  --grade my_module:is_right   or a function of a response (text, complete, token_ids) and its
                               record, to a bool, or to a dict with a bool for each measure

A rule that gets nothing right among the first 50 problems, and whose blocks use more than half of
their step cap, is stopped there.
"""
RING_WALK = "ring_walk"
RING_WALK_GRADE = "dmax_kernels.ring_walk.task:grade_response"
DEFAULTS: dict[str, Any] = {"max_new_tokens": 2048}
CONFIG = ConfigFile(repeated=("model", "rule", "logit_bias"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.usage = "%(prog)s --model NAME [--model ...] --data JSONL [--rule ...] [options]"
    parser.description = DESCRIPTION
    CONFIG.add_option(parser)
    add = parser.add_argument
    add(
        "--model",
        required=True,
        action="append",
        metavar="[LABEL=]NAME",
        help="a name or a folder, as `generate` takes it; several are compared, by their labels",
    )
    add(
        "--rule",
        action="append",
        metavar="NAME[:TAU,...]",
        help="a rule as `generate` knows it, with values of tau_dec; may be given several times "
        "(default: each model's own)",
    )
    group = parser.add_argument_group("problems")
    add = group.add_argument
    add(
        "--data",
        required=True,
        metavar="JSONL",
        help=f"problems with answers; or {RING_WALK}, the demo's task",
    )
    add("--problems", type=int, metavar="N", help="only the first N (default: all; ring_walk: 200)")
    add("--seed", type=int, default=0, help="which ring walks are drawn (default: 0)")
    add("--prompt-field", default="prompt", metavar="NAME", help="the text's field (%(default)s)")
    add("--prompt-suffix", default="", metavar="TEXT", help="is put after every prompt")
    add("--answer-field", default="answer", metavar="NAME", help="its field (%(default)s)")
    add("--extract", metavar="HOW", help="finds the answer in a text, see above")
    add("--grade", metavar="MODULE:FUNCTION", help="says which responses are right, see above")
    add_prompt_options(parser)
    group = parser.add_argument_group("decoding, the same for all rows")
    add_decode_options(group, defaults=DEFAULTS, without=("rule", "tau_dec", "seed"))
    group.add_argument(
        "--sample-seed",
        type=int,
        default=0,
        metavar="N",
        help="of the samples: problem n is sampled with the seed N + n (default: 0)",
    )
    group = parser.add_argument_group("where it runs")
    add_machine_options(group)
    add = group.add_argument
    add(
        "--batch-size",
        type=int,
        metavar="B",
        help="problems at a time (default: 1, as in the paper; ring_walk: all)",
    )
    add("--workers", type=int, default=1, metavar="N", help="processes that share the rows (1)")
    add("--threads", type=int, metavar="N", help="CPU threads of each process")
    group = parser.add_argument_group("output")
    add = group.add_argument
    add(
        "--baseline",
        type=int,
        default=0,
        metavar="ROW",
        help="the row that the others are compared with (0)",
    )
    add(
        "--rows",
        type=Path,
        metavar="FOLDER",
        help="keep each row there when it is finished, and take those that are there from there: "
        "the same command, or one with more rows, goes on after an interruption",
    )
    add("--json", type=Path, metavar="FILE", help="every figure, of each problem and of all pairs")
    add("--picture", type=Path, metavar="FILE", help="accuracy against tokens per forward, a PNG")
    add("--responses", type=Path, metavar="FILE", help="every response with its grade, JSON lines")


def run(args: argparse.Namespace) -> int:
    for option in ("problems", "batch_size", "workers", "threads"):
        value = getattr(args, option)
        if value is not None and value < 1:
            flag = "--" + option.replace("_", "-")
            raise ValueError(f"{flag} must be at least 1, got {value}")
    for option in ("json", "picture", "responses"):
        if getattr(args, option) is not None:
            check_output(f"--{option}", getattr(args, option))
    if args.rows is not None and args.rows.exists() and not args.rows.is_dir():
        raise ValueError(f"--rows must be a folder, got the file {args.rows}")
    if args.data != RING_WALK:
        check_input("--data", Path(args.data))
    from dmax_kernels.evaluation.report import LEGEND, Report
    from dmax_kernels.evaluation.rows import Rows

    device, dtype = machine(args)
    names = read_models(args.model)
    cells = read_cells(args, names)
    if not 0 <= args.baseline < len(cells):
        raise ValueError(f"--baseline must be in [0, {len(cells)}), got {args.baseline}")
    evaluation = make_evaluation(args)
    evaluation.check(cells)
    rows = Rows(args.rows, {**shown(evaluation), "dtype": args.dtype}, names)
    outcomes = {cell: outcome for cell in cells if (outcome := rows.find(cell)) is not None}
    if len(outcomes) < len(cells):
        left = [cell for cell in cells if cell not in outcomes]
        where = {"dtype": dtype, "device": device}
        for cell, outcome in decode_cells(args, evaluation, left, names, where):
            rows.save(cell, outcome)
            outcomes[cell] = outcome
    report = Report({cell: outcomes[cell] for cell in cells}, args.baseline)

    print(f"{len(evaluation.prompts)} problems of {args.data}, ops {evaluation.options['ops']!r}.")
    print(f"{LEGEND}\n\n{report.table()}")
    if args.json is not None:
        save_json(args.json, {"file": args.data, **shown(evaluation), **report.as_dict()})
        print(f"\nwrote {args.json}")
    if args.picture is not None:
        from dmax_kernels.evaluation.picture import write_picture

        write_picture(report, args.picture)
        print(f"\nwrote {args.picture}")
    if args.responses is not None:
        write_responses(report, evaluation, args.responses)
        print(f"\nwrote {args.responses}")
    return 0


def read_models(texts: list[str]) -> dict[str, str]:
    """The models' names by their labels; without a label, the name is one."""
    names: dict[str, str] = {}
    for text in texts:
        label, equals, name = text.partition("=")
        if not equals or "/" in label or not label:
            label = name = text
        if label in names:
            raise ValueError(f"--model must be given once for each label, got {label} twice")
        names[label] = name
    return names


def read_cells(args: argparse.Namespace, names: dict[str, str]) -> list[Cell]:
    """The rows: each model with each rule and each of its thresholds."""
    from dmax_kernels.evaluation.cells import Cell
    from dmax_kernels.models.pretrained import defaults_of

    cells: dict[Cell, None] = {}
    for model, name in names.items():
        own = defaults_of(name)
        for text in args.rule or [own.rule]:
            rule, _, taus = text.partition(":")
            try:
                values = [float(tau) for tau in taus.split(",")] if taus else [own.tau_dec]
            except ValueError:
                need = "NAME or NAME:TAU,TAU,..."
                raise ValueError(f"--rule must be {need}, got {text}") from None
            convergence = getattr(args, "convergence", "both")
            cells |= {Cell(model, rule, tau, convergence): None for tau in values}
    return list(cells)


def make_evaluation(args: argparse.Namespace) -> Evaluation:
    from dmax_kernels.evaluation.grading import Extracted, make_grade
    from dmax_kernels.evaluation.run import Evaluation
    from dmax_kernels.models.prompt_file import read_prompts

    walks = args.data == RING_WALK
    if walks:
        prompts = ring_walks(args.problems or 200, args.seed)
    else:
        field, suffix = args.prompt_field, args.prompt_suffix
        prompts = read_prompts([Path(args.data)], "--data", field=field, suffix=suffix)
        prompts = prompts[: args.problems]
    own = RING_WALK_GRADE if walks and args.extract is None else None
    grade = make_grade(args.extract, args.grade or own, args.answer_field)
    if isinstance(grade, Extracted):
        for prompt in prompts:
            try:
                grade.wanted(prompt.record)
            except ValueError as error:
                raise ValueError(f"{prompt.where}: {error}") from None
    defaults: dict[str, Any] = dict(DEFAULTS)
    if walks:
        from dmax_kernels.ring_walk.evaluate import MAX_NEW_TOKENS

        defaults["max_new_tokens"] = MAX_NEW_TOKENS
    options = {"ops": "fused", **defaults, **given_options(args, without=["seed"])}
    if args.sample_seed:
        options["seed"] = args.sample_seed
    options.pop("rule", None)  # this command's has another form, see `read_cells`
    return Evaluation(
        prompts,
        grade,
        options,
        batch_size=args.batch_size or (None if walks else 1),
        raw=args.raw,
        pad=args.pad_prompts,
    )


def ring_walks(count: int, seed: int) -> list[Prompt]:
    from dmax_kernels.models.prompt_file import Prompt
    from dmax_kernels.ring_walk import task

    records = map(task.record_of, task.evaluation_problems(count, seed=seed))
    return [
        Prompt(f"{RING_WALK}[{i}]", record, [{"role": "user", "content": record["prompt"]}])
        for i, record in enumerate(records)
    ]


def decode_cells(
    args: argparse.Namespace,
    evaluation: Evaluation,
    cells: list[Cell],
    names: dict[str, str],
    where: dict[str, Any],
) -> Iterator[tuple[Cell, Outcome]]:
    import torch
    from tqdm import tqdm

    from dmax_kernels.evaluation.run import evaluate
    from dmax_kernels.models.workers import available_cores

    workers = min(args.workers, len(cells))
    threads = args.threads or max(1, available_cores() // workers)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    total = len(cells) * len(evaluation.prompts)
    with tqdm(total=total, desc="decoding", unit="problem", leave=False) as bar:
        for cell, outcome in evaluate(
            *(evaluation, cells, names),
            workers=workers,
            threads=threads,
            on_batch=bar.update,
            **where,
        ):
            bar.total -= len(evaluation.prompts) - outcome.problems  # of a row that has collapsed
            yield cell, outcome


def shown(evaluation: Evaluation) -> dict[str, Any]:
    """What is the same in all rows, as JSON values."""
    from dmax_kernels.evaluation.rows import identity

    options = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in evaluation.options.items()
    }
    return {
        "data": identity(evaluation.prompts),
        "options": options,
        "batch_size": evaluation.batch_size,
        "grade": repr(evaluation.grade),
        "raw": evaluation.raw,
        "pad": evaluation.pad,
    }


def write_responses(report: Any, evaluation: Evaluation, path: Path) -> None:
    from dmax_kernels.evaluation.report import named

    lines = []
    for cell, outcome in report.rows.items():
        for i, text in enumerate(outcome.texts):
            graded = {measure: right[i] for measure, right in outcome.right.items()}
            place = {**named(cell), "problem": evaluation.prompts[i].where}
            counts = {"tokens": outcome.tokens[i], "forwards": outcome.forwards[i]}
            row = {**place, "response": text, **graded, **counts, "complete": outcome.complete[i]}
            lines.append(json.dumps(row) + "\n")
    write_text(path, "".join(lines))
