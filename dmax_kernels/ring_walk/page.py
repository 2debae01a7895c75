"""The page that plays a decoding step by step, in one file that needs no network.

`demo` writes it for one problem decoded in several ways, and `generate --trace` for the prompts of
any model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dmax_kernels.decoding import GenerationOutput
from dmax_kernels.files import write_text
from dmax_kernels.ring_walk import task
from dmax_kernels.ring_walk.evaluate import Cell, decode, response_words

TEMPLATE = Path(__file__).with_name("page.html")

# The decodings that the page compares; it opens with the first
SHOWN = (
    Cell("oput", "spd", 0.5),
    Cell("oput", "spd", 0.0),
    Cell("oput", "hard", 0.0),
    Cell("oput", "threshold", 0.5),
    Cell("base", "threshold", 0.95),
    Cell("base", "threshold", 0.5),
    Cell("base", "spd", 0.5),
    Cell("control", "threshold", 0.8),
    Cell("uniform", "uniform", 0.0),
)
MODEL_NAMES = {
    "base": "base",
    "oput": "OPUT",
    "control": "control",
    "uniform": "uniform",
}
DECODERS = {
    "threshold": "threshold",
    "hard": "hard tokens",
    "spd": "SPD",
    "uniform": "its own",
}  # short, because they stand on buttons
LONGEST_LABEL = 14  # characters of a token that a cell shows


def most_revised(model: Any, problems: list[task.Problem], ops: str) -> int:
    """The problem that SPD solves with most revisions, which is the one worth watching."""
    output = decode(model, problems, SHOWN[0], ops, trace=True)
    revisions = []
    for problem, words, row in zip(
        problems, response_words(output), output.trace.to_dict()["rows"], strict=True
    ):
        count = sum(len(step["revised"]) for block in row["blocks"] for step in block["steps"])
        revisions.append(count if task.grade(problem, words).strict else -1)
    return max(range(len(problems)), key=revisions.__getitem__)


def trace_run(model: Any, problem: task.Problem, cell: Cell, ops: str) -> dict[str, Any]:
    """One decoding as the page reads it."""
    output = decode(model, [problem], cell, ops, trace=True)
    (words,) = response_words(output)
    grade = task.grade(problem, words)
    return {
        "name": f"{MODEL_NAMES[cell.model]}, {DECODERS[cell.rule]}, τ {cell.tau_dec:g}",
        "blocks": output.trace.to_dict()["rows"][0]["blocks"],
        "tokens": int(output.num_tokens[0]),
        "forwards": int(output.num_forwards[0]),
        "answer": grade.answer,
        "strict": grade.strict,
    }


def write_page(models: dict[str, Any], problem: task.Problem, ops: str, path: Path) -> None:
    """Decode the problem in every way of `SHOWN` and write the page."""
    data = {
        "prompt": task.render_prompt(problem),
        "answer": str(problem.places[-1]),
        "words": list(task.WORDS),
        "eos": [task.EOS_ID],
        "runs": [trace_run(models[cell.model], problem, cell, ops) for cell in SHOWN],
    }
    fill_template(data, path)


def trace_runs(
    output: GenerationOutput, prompts: list[list[int]], tokenizer: Any, first: int = 0
) -> list[dict[str, Any]]:
    """What the page plays: one run per row of a traced output, numbered from `first` on."""
    assert output.trace is not None, "spd_generate(trace=True) records what the page plays"
    runs = []
    for row, traced in enumerate(output.trace.to_dict()["rows"]):
        ids = {t for block in traced["blocks"] for step in block["steps"] for t in step["token"]}
        runs.append(
            {
                "name": f"prompt {first + row + 1}",
                "prompt": [label(tokenizer, token) for token in prompts[row]],
                "words": {str(token): label(tokenizer, token) for token in sorted(ids)},
                "blocks": traced["blocks"],
                "tokens": int(output.num_tokens[row]),
                "forwards": int(output.num_forwards[row]),
            }
        )
    return runs


def label(tokenizer: Any, token: int) -> str:
    """A token as a cell shows it: with visible white space, and shortened."""
    text = tokenizer.decode([token]) or str(token)
    text = text.replace("\n", "↵").replace("\t", "⇥").strip(" ") or "␣"
    return text if len(text) <= LONGEST_LABEL else text[: LONGEST_LABEL - 1] + "…"


def write_trace_page(runs: list[dict[str, Any]], eos_token_ids: list[int], path: Path) -> None:
    words: dict[str, str] = {}
    for run in runs:
        words |= run.pop("words")
    fill_template({"words": words, "eos": eos_token_ids, "runs": runs}, path)


def fill_template(data: dict[str, Any], path: Path) -> None:
    """The page for this data: words by id, ids that end an answer, and runs with their blocks."""
    # "<" inside the data must not end the script element
    embedded = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    write_text(path, TEMPLATE.read_text("utf-8").replace("__DATA__", embedded))
