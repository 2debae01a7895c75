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
from dmax_kernels.files import check_output, save_json
from dmax_kernels.models.checkpoint import load_checkpoint
from dmax_kernels.models.workers import available_cores
from dmax_kernels.ring_walk import evaluate, page, picture, tables, task

# Batch, block, vocabulary, and a small hidden size: an embedding of 2,048 columns takes over a
# gigabyte and adds little to the step's time
STEP_SIZES = (1, BLOCK, VOCAB, 256)

DESCRIPTION = """\
Decodes held-out problems of a small task with three checkpoints of a 0.2-million-parameter block
diffusion model, in every way that the paper's Tables 3 and 4 compare, and prints

  - a table: base, OPUT and control x decoder x tau_dec,
  - the two convergence criteria apart and together, and the control at more thresholds,
  - in words, which of the paper's claims the table confirms, and what it does not show,
  - how much faster the fused step after a forward pass is than the eager one.

It writes dmax_demo.html (watch one problem being decoded; open it in a browser) and dmax_demo.png
(accuracy against tokens per forward). The checkpoints: base (masked diffusion), oput (base, then
on-policy uniform training on its own responses), control (base, then plain masked diffusion on the
same responses). One to two minutes on two cores.

A problem: six labelled moves on a ring of ten places and a start. The model writes the walk step by
step. "answer" means that the last place is right; "strict", that the derivation parses and is right
at every step.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = DESCRIPTION
    parser.add_argument(
        "--problems",
        type=int,
        default=200,
        metavar="N",
        help="held-out problems to decode (default: 200; collapsed cells stop after "
        f"{evaluate.FIRST_PROBLEMS}); fewer is faster and noisier",
    )
    parser.add_argument(
        "--output-dir",
        type=Path,
        default=Path(),
        metavar="DIR",
        help="where dmax_demo.html and dmax_demo.png go (default: the current folder)",
    )
    parser.add_argument(
        "--checkpoints",
        type=Path,
        metavar="DIR",
        help="folder with checkpoints base, oput and control, as `train` writes them "
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
        help="instead of the paper's tables, one table of every decoding rule on each checkpoint, "
        "with its Global-ARness@1 (1 = strictly left to right)",
    )


def run(args: argparse.Namespace) -> int:
    if args.problems < 1:
        raise ValueError(f"--problems must be at least 1, got {args.problems}")
    if args.show is not None and not 0 <= args.show < args.problems:
        raise ValueError(f"--show must be in [0, {args.problems}), got {args.show}")
    if args.workers < 1:
        raise ValueError(f"--workers must be at least 1, got {args.workers}")
    if args.json is not None:
        check_output("--json", args.json)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    checkpoints = {
        name: args.checkpoints / name if args.checkpoints else name for name in evaluate.MODELS
    }
    models = {name: load_checkpoint(checkpoint)[0] for name, checkpoint in checkpoints.items()}
    problems = task.evaluation_problems(args.problems, seed=args.seed)

    if args.rules:
        return run_rules(args, checkpoints, problems)

    results = decode_cells(evaluate.all_cells(), args, checkpoints, problems)
    print_legend(args)
    print(f"\n{tables.ablation_table(results)}")
    print("\nOPUT with SPD at tau_dec 0.5, by convergence criterion:")
    print(f"\n{tables.convergence_table(results)}")
    print("\nThe control between the thresholds above:")
    print(f"\n{tables.control_table(results)}")
    print("\nDoes the table bear the paper out?")
    for finding in tables.findings(results, args.problems):
        print(textwrap.fill(str(finding), 100, initial_indent="  ", subsequent_indent="      "))
    print(f"\n{textwrap.fill(tables.caveat(results, args.problems), 100)}")

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
    picture.write_picture(results, args.problems, png)
    print(f"\nWrote {html} (problem {show}, step by step) and {png}")
    write_json(args, {"cells": evaluate.as_json(results), "step_speedup": speedups})
    return 0


def run_rules(
    args: argparse.Namespace, checkpoints: dict[str, Any], problems: list[task.Problem]
) -> int:
    """The table of `--rules`."""
    cells = tables.rule_cells(evaluate.MODELS)
    results = decode_cells(list(cells), args, checkpoints, problems)
    print_legend(args)
    print("ARness: Global-ARness@1 up to the end of sequence, 1 = strictly left to right.")
    print(f"\n{tables.rules_table(results, cells)}")
    write_json(args, {"cells": tables.rules_json(results, cells)})
    return 0


def step_speedup(dtype: torch.dtype) -> float:
    """Median time of the reference step over the fused one's, on a confident model's logits."""
    work = WORKLOADS["spd_step_"].work(Inputs(dtype, values="peaked"), STEP_SIZES)
    times = compare(work.candidates, repetitions=5, before_each=work.restore)
    return times["eager"].median / times["fused"].median


def decode_cells(
    cells: list[evaluate.Cell],
    args: argparse.Namespace,
    checkpoints: dict[str, Any],
    problems: list[task.Problem],
) -> dict[evaluate.Cell, evaluate.Result]:
    results = {}
    with tqdm(total=len(cells), desc="decoding", unit="cell", leave=False) as progress:
        for cell, result in evaluate.evaluate_cells(
            cells, checkpoints, problems, args.ops, args.workers
        ):
            results[cell] = result
            progress.update()
    return results


def print_legend(args: argparse.Namespace) -> None:
    print(f"{args.problems} held-out problems, ops {args.ops!r}. answer, strict: % right;")
    print("t/f: tokens per forward pass; f/b: forward passes per block of 32.")


def write_json(args: argparse.Namespace, figures: dict[str, Any]) -> None:
    if args.json is None:
        return
    report = {"problems": args.problems, "seed": args.seed, **figures}
    save_json(args.json, report)
    print(f"Wrote {args.json}")
