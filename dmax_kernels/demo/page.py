"""The page: one problem's decoding step by step, in one file that needs no network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dmax_kernels.demo.evaluate import Cell, decode, response_words
from dmax_kernels.demo.table import MODEL_NAMES
from dmax_kernels.files import write_text
from dmax_kernels.models import ring_walk

TEMPLATE = Path(__file__).with_name("page.html")

# The decodings that the page lets one compare, the first shown first
SHOWN = (
    Cell("oput", "spd", 0.5),
    Cell("oput", "spd", 0.0),
    Cell("oput", "hard", 0.0),
    Cell("oput", "threshold", 0.5),
    Cell("base", "threshold", 0.95),
    Cell("base", "threshold", 0.5),
    Cell("base", "spd", 0.5),
    Cell("control", "threshold", 0.8),
    Cell("control", "spd", 0.5),
)
DECODERS = {"threshold": "threshold", "hard": "hard tokens", "spd": "SPD"}  # short: on buttons


def most_revised(model: Any, problems: list[ring_walk.Problem], ops: str) -> int:
    """The problem whose right decoding by SPD changed its mind most: the one worth watching."""
    output = decode(model, problems, SHOWN[0], ops, trace=True)
    revisions = []
    for problem, words, row in zip(
        problems, response_words(output), output.trace.to_dict()["rows"], strict=True
    ):
        count = sum(len(step["revised"]) for block in row["blocks"] for step in block["steps"])
        revisions.append(count if ring_walk.grade(problem, words).strict else -1)
    return max(range(len(problems)), key=revisions.__getitem__)


def trace_run(model: Any, problem: ring_walk.Problem, cell: Cell, ops: str) -> dict[str, Any]:
    """One decoding as the page reads it."""
    output = decode(model, [problem], cell, ops, trace=True)
    (words,) = response_words(output)
    grade = ring_walk.grade(problem, words)
    return {
        "name": f"{MODEL_NAMES[cell.model]}, {DECODERS[cell.rule]}, τ {cell.tau_dec:g}",
        "blocks": output.trace.to_dict()["rows"][0]["blocks"],
        "tokens": int(output.num_tokens[0]),
        "forwards": int(output.num_forwards[0]),
        "answer": grade.answer,
        "strict": grade.strict,
    }


def write_page(models: dict[str, Any], problem: ring_walk.Problem, ops: str, path: Path) -> None:
    """Decode the problem in every way of `SHOWN` and write the page."""
    data = {
        "prompt": ring_walk.render_prompt(problem),
        "answer": str(problem.places[-1]),
        "words": list(ring_walk.WORDS),
        "eos": [ring_walk.EOS_ID],
        "runs": [trace_run(models[cell.model], problem, cell, ops) for cell in SHOWN],
    }
    fill_template(data, path)


def fill_template(data: dict[str, Any], path: Path) -> None:
    """The page for this data: words by id, ids that end an answer, and runs with their blocks."""
    # "<" inside the data must not end the script element
    embedded = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    write_text(path, TEMPLATE.read_text("utf-8").replace("__DATA__", embedded))
