"""``python -m dmax_kernels demo``: the paper's ablations on a model small enough for a laptop."""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dmax_kernels.bench import WORKLOADS, Inputs
from dmax_kernels.bench.timer import compare
from dmax_kernels.bench.workload import BLOCK, VOCAB
from dmax_kernels.decoding.config import OPS
from dmax_kernels.evaluation.cells import Cell, Outcome
from dmax_kernels.evaluation.picture import write_picture
from dmax_kernels.evaluation.report import Report
from dmax_kernels.files import check_output, save_json
from dmax_kernels.models.checkpoint import load_checkpoint
from dmax_kernels.models.workers import available_cores
from dmax_kernels.ring_walk import (
    claims,
    evaluate,
    judging,
    page,
    picture,
    record,
    rules_table,
    tables,
    task,
)

# Batch, block, vocabulary, and a small hidden size: an embedding of 2,048 columns takes over a
# gigabyte and adds little to the step's time
STEP_SIZES = (1, BLOCK, VOCAB, 256)

DESCRIPTION = """\
Decodes held-out problems of a small task with a block diffusion model of 0.2 million parameters,
trained in each of the ways that the paper compares, and prints

  - the paper's Tables 1 to 4 for this task, each share with its difference from a row of reference
    on the same problems and an interval of 95 %,
  - each of the paper's claims about them, with the test that decides it: holds, fails, undecided,
  - the same verdicts after other lengths of training, from a record that `train --config
    ring_walk_ladder` made,
  - how much faster the fused step after a forward pass is than the eager one.

It writes dmax_demo.html (watch one problem being decoded; open it in a browser), dmax_demo.png
(the paper's Figure 4) and dmax_demo_ladder.png (the effects along the training). The models: base
(masked diffusion), and from it, on its own responses, OPUT, uniform diffusion, certainty forcing,
and as a control plain masked diffusion. One to two minutes on two cores.

A problem: six labelled moves on a ring of ten places and a start. The model writes the walk step by
step. "answer" means that the last place is right, which is the paper's kind of accuracy; "strict",
that the derivation parses and is right at every step.
"""
PROBLEMS = 500  # of the table, unless --problems is given
STEPS = 200  # of the trainings that ship
# The lines of Figure 4: a rule of a method over its thresholds
CURVES = judging.AREAS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = DESCRIPTION
    parser.add_argument(
        "--task",
        choices=("ring_walk", "gsm"),
        default="ring_walk",
        help="gsm: instead of all this, word problems in English from the templates of "
        "GSM-Symbolic, with a base, OPUT and certainty forcing of 0.9 million parameters: a table "
        "of methods and a page that plays decodings in words; takes --problems (default: 96), "
        "--checkpoints of `train --config gsm`, --output-dir, --ops, --show and --json",
    )
    parser.add_argument(
        "--problems",
        type=int,
        metavar="N",
        help="held-out problems to decode (default: 500; collapsed cells stop after "
        f"{evaluate.FIRST_PROBLEMS}); fewer is faster and noisier",
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=STEPS,
        metavar="N",
        help=f"decode the trainings of N steps (default: {STEPS}, which ship; others need "
        "--checkpoints)",
    )
    parser.add_argument(
        "--output-dir",
        type=Path,
        default=Path(),
        metavar="DIR",
        help="where dmax_demo.html and the pictures go (default: the current folder)",
    )
    parser.add_argument(
        "--checkpoints",
        type=Path,
        metavar="DIR",
        help="folder of `train --config ring_walk_ladder`, with oput-N, control-N, uniform-N and "
        "certainty-N; or with --rules of `train --config ring_walk`, with base, oput and control "
        "(default: the shipped ones)",
    )
    parser.add_argument(
        "--ops",
        choices=sorted(OPS),
        default="fused",
        help="fused kernels or the eager reference, which give the same tokens (default: fused)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="which held-out problems are drawn (default: 0)"
    )
    parser.add_argument(
        "--show",
        type=int,
        metavar="I",
        help="the problem that the page shows, counted from 0 (default: of the first "
        f"{evaluate.FIRST_PROBLEMS}, the one that SPD gets right with most revisions)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=min(available_cores(), 8),
        metavar="N",
        help="processes to decode in (default: one per core, at most 8; here %(default)s)",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write every figure to this file"
    )
    parser.add_argument(
        "--rules",
        action="store_true",
        help="instead of the paper's tables, one table of every decoding rule on base, OPUT and "
        "control, with its Global-ARness@1 (1 = strictly left to right)",
    )


def run(args: argparse.Namespace) -> int:
    if args.task == "gsm":
        from dmax_kernels.gsm import show

        return show.run_demo(args)
    if args.problems is None:
        args.problems = PROBLEMS
    for option in ("problems", "steps", "workers"):
        if getattr(args, option) < 1:
            raise ValueError(f"--{option} must be at least 1, got {getattr(args, option)}")
    if args.show is not None and not 0 <= args.show < args.problems:
        raise ValueError(f"--show must be in [0, {args.problems}), got {args.show}")
    if args.steps != STEPS and args.checkpoints is None:
        raise ValueError(f"--steps must be {STEPS} without --checkpoints, got {args.steps}")
    if args.json is not None:
        check_output("--json", args.json)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    problems = task.evaluation_problems(args.problems, seed=args.seed)
    if args.rules:
        return run_rules(args, problems)

    checkpoints: dict[str, Any] = {"base": "base"}
    for method in evaluate.METHODS:
        if method != "base":
            name = f"{method}-{args.steps}"
            checkpoints[method] = args.checkpoints / name if args.checkpoints else name
    models = {name: load_checkpoint(checkpoint)[0] for name, checkpoint in checkpoints.items()}
    cells = evaluate.all_cells()
    decoded = decode_cells(cells, args, checkpoints, problems)
    outcomes = {cell: decoded[cell] for cell in cells}
    print_legend(args)
    print(f"{textwrap.fill(tables.setting(args.steps), 100)}\n\n{tables.all_tables(outcomes)}")
    print(f"\nThe paper's claims, after {args.steps} steps:\n{tables.findings(outcomes)}")
    ladder = record.shipped_record()
    print(f"\n{textwrap.fill(LADDER.format(ladder['problems']), 100)}\n")
    print(tables.ladder_table(ladder))

    speedups = {
        str(dtype).removeprefix("torch."): step_speedup(dtype)
        for dtype in (torch.float32, torch.bfloat16)
    }
    print(
        f"\nThe step after a forward pass (spd_step_: {BLOCK} rows, V = {VOCAB:,}, CPU, "
        f"{torch.get_num_threads()} threads), eager reference over fused: "
        + ", ".join(f"{ratio:.1f}x in {name}" for name, ratio in speedups.items())
    )

    show = args.show
    if show is None:
        show = page.most_revised(models["oput"], problems[: evaluate.FIRST_PROBLEMS], args.ops)
    html, png = args.output_dir / "dmax_demo.html", args.output_dir / "dmax_demo.png"
    page.write_page(models, problems[show], args.ops, html)
    write_picture(Report(curves(outcomes)), png)
    steps_png = args.output_dir / "dmax_demo_ladder.png"
    picture.write_ladder(ladder, steps_png)
    print(f"\nWrote {html} (problem {show}, step by step), {png} and {steps_png}")
    judged = {measure: claims.as_json(outcomes, measure) for measure in evaluate.MEASURES}
    figures = {"steps": args.steps, "cells": evaluate.as_json(outcomes), "claims": judged}
    write_json(args, {**figures, "step_speedup": speedups})
    return 0


LADDER = (
    "The same claims after 100 to 600 steps, by answer / strict (+ holds, - fails, . undecided); "
    "a, b, c are three seeds, of a greedy rollout (with d: of a drawn one, as in the paper). From "
    "a record of {} problems that `train --config ring_walk_ladder` made. One task, one model of "
    "0.2 million parameters; intervals are not corrected for the number of claims."
)


def curves(outcomes: dict[Cell, Outcome]) -> dict[Cell, Outcome]:
    """The cells of Figure 4."""
    return {
        cell: outcome
        for cell, outcome in outcomes.items()
        if (cell.model, cell.rule) in CURVES and judging.is_plain(cell)
    }


def run_rules(args: argparse.Namespace, problems: list[task.Problem]) -> int:
    """The table of `--rules`."""
    folder = args.checkpoints
    checkpoints = {name: folder / name if folder else name for name in evaluate.MODELS}
    cells = rules_table.rule_cells(evaluate.MODELS)
    outcomes = decode_cells(list(cells), args, checkpoints, problems)
    print_legend(args)
    print("ARness: Global-ARness@1 up to the end of sequence, 1 = strictly left to right.")
    print(f"\n{rules_table.rules_table(outcomes, cells)}")
    write_json(args, {"cells": rules_table.rules_json(outcomes, cells)})
    return 0


def step_speedup(dtype: torch.dtype) -> float:
    """Median time of the reference step over the fused one's, on a confident model's logits."""
    work = WORKLOADS["spd_step_"].work(Inputs(dtype, values="peaked"), STEP_SIZES)
    times = compare(work.candidates, repetitions=5, before_each=work.restore)
    return times["eager"].median / times["fused"].median


def decode_cells(
    cells: list[Cell],
    args: argparse.Namespace,
    checkpoints: dict[str, Any],
    problems: list[task.Problem],
) -> dict[Cell, Outcome]:
    outcomes = {}
    with tqdm(total=len(cells), desc="decoding", unit="cell", leave=False) as progress:
        for cell, outcome in evaluate.evaluate_cells(
            cells, checkpoints, problems, args.ops, args.workers
        ):
            outcomes[cell] = outcome
            progress.update()
    return outcomes


def print_legend(args: argparse.Namespace) -> None:
    print(f"{args.problems} held-out problems, ops {args.ops!r}. answer, strict: % right;")
    print("t/f: tokens per forward pass; f/b: forward passes per block of 32.")


def write_json(args: argparse.Namespace, figures: dict[str, Any]) -> None:
    if args.json is None:
        return
    report = {"problems": args.problems, "seed": args.seed, **figures}
    save_json(args.json, report)
    print(f"Wrote {args.json}")
