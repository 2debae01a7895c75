"""Measured rows: what each way to decode did to each problem, a line of JSON for each."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dmax_kernels.evaluation.cells import Cell, Outcome

ROWS = "rows.jsonl"


@dataclass(frozen=True)
class Row:
    """`split`: which problems were decoded, "test" (of learnt templates) or "new_template"."""

    split: str
    cell: Cell
    outcome: Outcome

    @property
    def key(self) -> tuple[str, Cell]:
        return self.split, self.cell

    def __str__(self) -> str:
        cell, outcome = self.cell, self.outcome
        return (
            f"{self.split:12} {cell.model:9} {cell.rule:12} tau {cell.tau_dec:<4}  "
            f"answer {outcome.share('answer'):6.1%}  strict {outcome.share('strict'):6.1%}  "
            f"tokens per forward {outcome.tokens_per_forward():.2f}"
        )


def append_row(path: Path, row: Row) -> None:
    """One line, in one write, because several processes append to the file."""
    values = asdict(row.outcome)
    del values["texts"]
    line = {"split": row.split, "cell": asdict(row.cell), "outcome": values}
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(file, (json.dumps(line) + "\n").encode())
    finally:
        os.close(file)


def read_rows(path: Path) -> list[Row]:
    """The whole lines of the file; a line that was cut short by a kill is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_bytes().split(b"\n"):
        try:
            values = json.loads(line)
        except ValueError:
            continue
        cell, outcome = Cell(**values["cell"]), Outcome(**values["outcome"])
        rows.append(Row(values["split"], cell, outcome))
    return rows


def spread_over_templates(records: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """So many of the records, of each template the same number as nearly as can be."""
    waiting: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        waiting[record["template"]].append(record)
    rounds = max(map(len, waiting.values()), default=0)
    chosen = [each[i] for i in range(rounds) for each in waiting.values() if i < len(each)]
    return chosen[:count]
