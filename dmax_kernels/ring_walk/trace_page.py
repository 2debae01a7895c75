"""The demo's viewer for any model's trace: one file that needs no network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dmax_kernels.decoding import GenerationOutput
from dmax_kernels.ring_walk.page import fill_template

LONGEST_LABEL = 14


def trace_runs(
    output: GenerationOutput, prompts: list[list[int]], tokenizer: Any, first: int = 0
) -> list[dict[str, Any]]:
    """What the page plays, one run per row of a traced output; `first` numbers the rows on."""
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
    """A token as a cell shows it: white space made visible, and not too long."""
    text = tokenizer.decode([token]) or str(token)
    text = text.replace("\n", "↵").replace("\t", "⇥").strip(" ") or "␣"
    return text if len(text) <= LONGEST_LABEL else text[: LONGEST_LABEL - 1] + "…"


def write_trace_page(runs: list[dict[str, Any]], eos_token_ids: list[int], path: Path) -> None:
    words: dict[str, str] = {}
    for run in runs:
        words |= run.pop("words")
    fill_template({"words": words, "eos": eos_token_ids, "runs": runs}, path)
