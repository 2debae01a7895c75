"""What `demo --task gsm` prints and writes: rows as a table, and a decoding that plays in words."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dmax_kernels.evaluation.cells import Cell, Outcome, Response, decode, run_cell
from dmax_kernels.evaluation.report import LEGEND, Report
from dmax_kernels.files import check_output, save_json
from dmax_kernels.gsm import task
from dmax_kernels.gsm.bundle import Bundle
from dmax_kernels.ring_walk.page import fill_template, label, trace_runs

# The decodings that are compared; the page opens with the first
SHOWN = (
    Cell("oput", "spd", 0.5),
    Cell("oput", "spd", 0.0),
    Cell("oput", "hard", 0.0),
    Cell("base", "threshold", 0.95),
    Cell("base", "threshold", 0.5),
    Cell("control", "threshold", 0.8),
    Cell("certainty", "threshold", 0.95),
    Cell("uniform", "uniform", 0.0),
)


PAGE = "dmax_gsm.html"
PROBLEMS = 96
# The base, OPUT, and certainty forcing, which has the greatest AUP
SHIPPED = Path(__file__).parent / "weights"


def run_demo(args: argparse.Namespace) -> int:
    """`demo --task gsm`: decodes some problems here, prints the rows and writes the page."""
    if args.rules or args.seed:
        raise ValueError("--rules and --seed are not for --task gsm, got one of them")
    if args.json is not None:
        check_output("--json", args.json)
    bundle = Bundle.open(args.checkpoints or SHIPPED)
    available = bundle.problems["test"]
    count = PROBLEMS if args.problems is None else args.problems
    if not 1 <= count <= len(available):
        raise ValueError(f"--problems must be in [1, {len(available)}] here, got {count}")
    if args.show is not None and not 0 <= args.show < count:
        raise ValueError(f"--show must be in [0, {count}), got {args.show}")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    records = available[:count]
    rows: dict[Cell, Outcome] = {}
    cells = shown_cells(bundle)
    for cell in tqdm(cells, desc="decoding", unit="cell", leave=False):
        rows[cell] = decode_cell(bundle, records, cell, args.ops)
    print(f"{count} held-out problems of {len(bundle.learnt)} templates, ops {args.ops!r}.")
    print("answer: the number after the last ####; strict: the template's text, however worded.")
    print(f"{LEGEND}\n")
    report = Report(rows)
    print(report.table())
    if args.json is not None:
        save_json(args.json, {"problems": count, **report.as_dict()})
    show = args.show
    if show is None:
        show = first_right(rows[cells[0]])
    page = args.output_dir / PAGE
    write_page(bundle, records[show], args.ops, page)
    print(f"\nwrote {page} (problem {show}, step by step)")
    return 0


def decode_cell(bundle: Bundle, records: list[dict[str, Any]], cell: Cell, ops: str) -> Outcome:
    return run_cell(
        bundle.model(cell.model),
        bundle.tokenizer,
        bundle.measured(records),
        cell,
        task.grade,
        bundle.options(ops),
    )


def shown_cells(bundle: Bundle) -> list[Cell]:
    return [cell for cell in SHOWN if cell.model in bundle.names]


def first_right(outcome: Outcome) -> int:
    """The first problem that was solved, else the first one."""
    right = outcome.right["answer"]
    return right.index(True) if True in right else 0


def write_page(bundle: Bundle, record: dict[str, Any], ops: str, path: Path) -> None:
    """Decodes the problem in every way of `SHOWN` for which there is a model."""
    words: dict[str, str] = {}
    runs = []
    (problem,) = bundle.measured([record])
    for cell in shown_cells(bundle):
        model, options = bundle.model(cell.model), bundle.options(ops)
        output = decode(model, [problem], replace(cell, trace=True), options)
        (run,) = trace_runs(output, [[]], bundle.tokenizer)
        words |= run.pop("words")
        (ids,) = output.answers
        text = bundle.tokenizer.decode(ids, skip_special_tokens=True)
        graded = task.grade(Response(ids, ids[-1] == task.EOS_ID, text), record)
        name = f"{cell.model}, {cell.rule}, τ {cell.tau_dec:g}"
        runs.append({**run, "name": name, "prompt": None, **graded})
    prompt = [label(bundle.tokenizer, token) for token in problem.ids if token != task.PAD_ID]
    data = {
        "prompt": prompt,
        "answer": record["answer"],
        "words": words,
        "eos": [task.EOS_ID],
        "runs": runs,
    }
    fill_template(data, path)
