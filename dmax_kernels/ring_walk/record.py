"""What each arm of the ladder decodes, judged by the claims: OUTPUT/ladder.json.

The demo ships a copy of that file, so that it can show all lengths and seeds and need not hold
their weights. Finished rows are kept in OUTPUT/rows, from which the same call goes on.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from dmax_kernels.evaluation.cells import Cell, Outcome
from dmax_kernels.evaluation.metrics import share_interval
from dmax_kernels.evaluation.rows import Rows
from dmax_kernels.files import read_json, write_text
from dmax_kernels.models.checkpoint import SHIPPED, SHIPPED_DIR
from dmax_kernels.ring_walk import claims, judging, task
from dmax_kernels.ring_walk.evaluate import (
    MEASURES,
    METHODS,
    Result,
    evaluate_cells,
    method_cells,
)
from dmax_kernels.ring_walk.ladder import FIRST_SEED, RUNGS, SEEDS, Arm

PROBLEMS = 500
PROBLEM_SEED = 0
RECORD = SHIPPED_DIR / "ladder.json"


def arm_cells(arms: list[Arm]) -> list[Cell]:
    """The base's cells and those of every arm, whose label is the arm's name."""
    cells = method_cells("base")
    for arm in arms:
        cells += method_cells(arm.method.removesuffix("_drawn"), arm.name)
    return cells


def decode_arms(
    output: Path, arms: list[Arm], *, ops: str, workers: int, problems: int = PROBLEMS
) -> Iterator[tuple[Cell, Outcome]]:
    """The outcome of each cell, from OUTPUT/rows or decoded now and kept there."""
    settings = {"problems": problems, "seed": PROBLEM_SEED, "ops": ops}
    names = {arm.name: arm.name for arm in arms} | {"base": "base"}
    rows = Rows(output / "rows", settings, names)
    left = []
    for cell in arm_cells(arms):
        outcome = rows.find(cell)
        if outcome is None:
            left.append(cell)
        else:
            yield cell, outcome
    if not left:
        return
    checkpoints = {name: "base" if name == "base" else output / name for name in names}
    walks = task.evaluation_problems(problems, seed=PROBLEM_SEED)
    for cell, outcome in evaluate_cells(left, checkpoints, walks, ops, min(workers, len(left))):
        outcome.texts = []  # most of the bytes, and read by nobody
        rows.save(cell, outcome)
        yield cell, outcome


def view(outcomes: Mapping[Cell, Outcome], arms: list[Arm], rung: int, seed: int, oput: str) -> Any:
    """The cells of one rung under the methods' names, as the claims have them.

    A method that was not trained with this seed is taken with the first one.
    """
    found: dict[Cell, Outcome] = {}
    for method in METHODS:
        trained = oput if method == "oput" else method
        candidates = (Arm(trained, rung, seed), Arm(trained, rung, FIRST_SEED))
        arm = next((arm for arm in candidates if arm in arms), None)
        label = "base" if method == "base" else arm.name if arm else None
        if label is None:
            continue
        for cell in method_cells(method):
            outcome = outcomes.get(replace(cell, model=label))
            if outcome is not None:
                found[cell] = outcome
    return found


def views(arms: list[Arm]) -> Iterator[tuple[int, int, str]]:
    """(steps, seed, OPUT's method) of every OPUT arm."""
    for oput in ("oput", "oput_drawn"):
        for rung in RUNGS:
            for seed in SEEDS:
                if Arm(oput, rung, seed) in arms:
                    yield rung, seed, oput


def record(
    outcomes: Mapping[Cell, Outcome],
    arms: list[Arm],
    logs: dict[str, Any],
    problems: int = PROBLEMS,
) -> dict[str, Any]:
    """The file's content. The seconds are left out: they are of whatever machine decoded."""
    judged = []
    for rung, seed, oput in views(arms):
        cells = view(outcomes, arms, rung, seed, oput)
        if set(cells) < {cell for method in METHODS for cell in method_cells(method)}:
            continue
        for measure in MEASURES:
            areas = judging.drawn_areas(cells, measure)
            judged.append(
                {
                    "steps": rung,
                    "seed": seed,
                    "rollout": "drawn" if oput == "oput_drawn" else "greedy",
                    "measure": measure,
                    "aup": {f"{m} {rule}": round(float(a[0]), 1) for (m, rule), a in areas.items()},
                    "claims": rounded(claims.as_json(cells, measure)),
                }
            )
    rows = [
        {
            "arm": cell.model,
            **fields_of(cell),
            **rounded({**asdict(Result.of(outcome)), "tokens_per_second": None}),
            **bounds(outcome),
        }
        for cell, outcome in outcomes.items()
    ]
    return {
        "problems": problems,
        "problem_seed": PROBLEM_SEED,
        "arms": {arm.name: {**asdict(arm), **logs[arm.name]} for arm in arms},
        "claims": [f"{claim.where}: {claim.text}" for claim in claims.CLAIMS],
        "rows": rows,
        "judged": judged,
    }


def fields_of(cell: Cell) -> dict[str, Any]:
    return {"rule": cell.rule, "tau_dec": cell.tau_dec, "convergence": cell.convergence}


def bounds(outcome: Outcome) -> dict[str, list[float]]:
    """Wilson's intervals of the shares."""
    return {
        f"{measure}_interval": rounded(
            list(share_interval(sum(outcome.right[measure]), outcome.problems))
        )
        for measure in MEASURES
    }


def rounded(value: Any) -> Any:
    """To four digits; entries that are None are left out."""
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items() if each is not None}
    return [rounded(each) for each in value] if isinstance(value, list) else value


def log_of(output: Path, arm: Arm) -> dict[str, Any]:
    """What the record keeps of an arm's log."""
    log = read_json(output / "logs" / f"{arm.name}.json", "ladder")
    config = log["config"]
    return {
        "optimizer": config["optimizer"],
        "rollout_temperature": config["rollout_temperature"],
        "seconds": log["seconds"],
        "final_loss": log["final_loss"],
        "made_with": log["made_with"],
    }


def write_record(
    output: Path, arms: list[Arm], *, ops: str = "fused", workers: int = 1, problems: int = PROBLEMS
) -> dict[str, Any]:
    """Decodes and judges the arms, and writes OUTPUT/ladder.json."""
    outcomes = dict(decode_arms(output, arms, ops=ops, workers=workers, problems=problems))
    ordered = {cell: outcomes[cell] for cell in arm_cells(arms)}
    content = record(ordered, arms, {arm.name: log_of(output, arm) for arm in arms}, problems)
    write_text(output / "ladder.json", as_lines(content))
    return content


def as_lines(content: dict[str, Any]) -> str:
    """JSON with an entry of each list or object on a line, so that a change can be read."""

    def lines(value: Any) -> str:
        pack = partial(json.dumps, separators=(",", ":"))
        if isinstance(value, dict):
            return "{\n" + ",\n".join(f"{pack(k)}:{pack(v)}" for k, v in value.items()) + "}"
        return (
            "[\n" + ",\n".join(map(pack, value)) + "]" if isinstance(value, list) else pack(value)
        )

    return "{\n" + ",\n".join(f"{json.dumps(k)}: {lines(v)}" for k, v in content.items()) + "}\n"


def ship(output: Path, weights: Path = SHIPPED_DIR) -> None:
    """Copies the record, and the trainings that the demo decodes, to where the package has them.

    The model's code stays out, and so does the config's pointer to it: the package has it once.
    """
    for name in SHIPPED:
        if not (output / name).is_dir():
            continue
        folder = weights / name
        folder.mkdir(parents=True, exist_ok=True)
        for file in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(output / name / file, folder / file)
        config = read_json(output / name / "config.json", "ship")
        config.pop("auto_map", None)
        write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
    shutil.copyfile(output / "ladder.json", weights / "ladder.json")


@cache
def shipped_record() -> dict[str, Any]:
    return read_json(RECORD, "ladder")
