"""``python -m dmax_kernels.ring_walk.nap``: NAP's tables in miniature, from training to verdicts.

Writes OUTPUT/nap.json and OUTPUT/order.png, and prints the tables. The same command continues what
it finds in OUTPUT. On one GPU it takes a minute or two, on two CPU cores hours; fewer problems and
steps are for trying it out.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dmax_kernels.decoding.extra import write_order_picture
from dmax_kernels.files import save_json
from dmax_kernels.models.workers import run_tasks
from dmax_kernels.ring_walk.nap import report, scorer
from dmax_kernels.ring_walk.nap.arms import Decoding, Settings, Task, outcome_path, run_task, train
from dmax_kernels.ring_walk.nap.data import ARMS

SCORER = "scorer"
PANELS = {
    "long chain, AO": ("long_chain", "ao"),
    "base, AO": ("base", "ao"),
    "base, random": ("base", "random"),
    "NAP, parallel-forced": ("nap_3", "parallel"),
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m dmax_kernels.ring_walk.nap", description=__doc__
    )
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="FOLDER")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--base-steps", type=int, default=800, help="default: %(default)s")
    add("--steps", type=int, default=800, help="of each arm after that (default: %(default)s)")
    add("--batch-size", type=int, default=64, help="default: %(default)s")
    add("--examples", type=int, default=16384, help="training problems (default: %(default)s)")
    add("--problems", type=int, default=500, help="held-out problems (default: %(default)s)")
    add("--scorer-steps", type=int, default=600, help="default: %(default)s")
    add("--seeds", type=int, default=1, help="of each arm (default: %(default)s)")
    add("--workers", type=int, default=1, help="processes (default: %(default)s)")
    return parser.parse_args()


def work(settings: Settings, folder: Path, scorer_steps: int, number: int) -> Any:
    """The work of process `number`: an arm, or the scorer."""

    def run(chosen: Task | str) -> dict[str, Any]:
        if not isinstance(chosen, str):
            return run_task(settings, folder, chosen)
        path = folder / "outcomes" / f"{SCORER}.json"
        if path.exists() and json.loads(path.read_text("utf-8"))["steps"] == scorer_steps:
            return json.loads(path.read_text("utf-8"))
        scored = scorer.measure(scorer_steps, settings.device)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_json(path, scored)
        return scored

    return run


def main() -> int:
    args = arguments()
    args.output.mkdir(parents=True, exist_ok=True)
    settings = Settings(
        base_steps=args.base_steps,
        steps=args.steps,
        batch_size=args.batch_size,
        examples=args.examples,
        problems=args.problems,
        device=args.device,
    )
    setup = partial(work, settings, args.output, args.scorer_steps)
    base = Task("base", 0)
    arms = [Task(arm, seed) for seed in range(args.seeds) for arm in ARMS[1:]]
    if not all(outcome_path(args.output, each).exists() for each in (base, *arms)):
        train(settings, base, args.output)  # first: all others start from it
    done = dict(run_tasks(setup, [base, *arms, SCORER], workers=args.workers))
    scored = done.pop(SCORER)
    outcomes = list(done.values())
    machines = sorted({outcome["made_with"] for outcome in outcomes})
    found = {
        "command": "python -m dmax_kernels.ring_walk.nap " + " ".join(sys.argv[1:]),
        "made_with": f"{'; '.join(machines)}: the base {args.base_steps} steps after the demo's "
        f"base, each arm {args.steps} steps after that, {args.batch_size} sequences a step, "
        f"{args.examples} training problems; training seeds: {args.seeds}, {args.problems} "
        "held-out problems.",
        "settings": {**asdict(settings), "seeds": args.seeds},
        **report.report(outcomes, scored),
        "picture": "At which step each position of the first problem was decoded, a token per step",
    }
    save_json(args.output / "nap.json", found)
    orders = {
        name: report.find(outcomes, arm, Decoding(order, 1))
        for name, (arm, order) in PANELS.items()
    }
    traces = {
        name: {"rows": [{"blocks": [{"start": 0, "steps": [{"promoted": s} for s in steps]}]}]}
        for name, steps in orders.items()
    }
    write_order_picture(traces, args.output / "order.png")
    print(report.as_text(found))
    return 0
