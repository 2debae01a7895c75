"""Writes the problems' file: `python -m dmax_kernels.gsm.problems --output problems.jsonl.gz`.

It draws from the templates of GSM-Symbolic (arXiv 2410.05229) as the package reasoning-gym has them
(0.1.25, Apache-2.0), which must be installed for this command and for nothing else. Templates that
the package itself lists as faulty are left out, and so are those with a question or a chain of
thought that does not fit in the model's context.

Splits: every tenth template is held out whole ("new_template"). Of the others, one combination of a
template and the numbers in its question in eight is held out ("test"): its numbers never occur
together in training, whatever the names. "train" and "distill" share no question.
"""

from __future__ import annotations

import argparse
import gzip
import importlib
import json
import math
import random
import re
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dmax_kernels.files import check_output, write_atomically
from dmax_kernels.gsm.task import EOS, PROMPT_TOKENS, RESPONSE_TOKENS, TOKEN, final_number
from dmax_kernels.gsm.wording import reworded

PACKAGE = "reasoning_gym.arithmetic.gsm_symbolic"
HELD_OUT_ONE_IN = 8  # combinations of a template and its numbers
NEW_TEMPLATE_ONE_IN = 10  # templates
COUNTS = {"train": 600, "distill": 120, "test": 32, "new_template": 32}  # of each template
SEEN_SPLITS = ("train", "distill", "test")  # whose templates the base model learns
TRIES = 20  # draws for each problem that is wanted: some templates have few
PROBED = 200  # draws that tell whether a template fits
MOSTLY = 0.9  # of these draws, for --below
NUMBER = r"\d+(?:\.\d+)?"

Generator = Callable[[random.Random, float], dict[str, Any]]


def generators() -> dict[int, Generator]:
    """The templates that reasoning-gym itself draws from, by their numbers."""
    try:
        tables = [importlib.import_module(f"{PACKAGE}.{name}") for name in NAMES]
    except ModuleNotFoundError as error:
        raise ValueError(
            f"the problems need the Python package reasoning-gym ({error}): "
            "pip install reasoning-gym"
        ) from None
    listed = importlib.import_module(f"{PACKAGE}.gsm_symbolic").tasks_ok
    found = {}
    for table in tables:
        for name in dir(table):
            if name.startswith("generate_") and int(name[9:]) in listed:
                found[int(name[9:])] = getattr(table, name)
    return dict(sorted(found.items()))


NAMES = ("generators_00_49", "generators_50_99")


def draw(
    template: int, generator: Generator, rng: random.Random, wordings: bool = False
) -> dict[str, Any]:
    drawn = generator(rng, 1.0)
    response = drawn["metadata"]["answer_cot"]
    if wordings:
        response = reworded(response, rng)
    return {
        "template": template,
        "prompt": drawn["question"],
        "response": response,
        "answer": final_number(response),
    }


def is_held_out(record: dict[str, Any]) -> bool:
    """By a CRC-32 of the template and the numbers in the question."""
    numbers = " ".join(re.findall(r"\d+", record["prompt"]))
    return zlib.crc32(f"{record['template']} {numbers}".encode()) % HELD_OUT_ONE_IN == 0


def fits(record: dict[str, Any]) -> bool:
    prompt, response = (len(re.findall(TOKEN, record[name])) for name in ("prompt", "response"))
    return prompt <= PROMPT_TOKENS and response + len([EOS]) <= RESPONSE_TOKENS


def computed(record: dict[str, Any]) -> float:
    """The largest number in the chain of thought that the question does not have."""
    asked, said = (set(re.findall(NUMBER, record[name])) for name in ("prompt", "response"))
    return max(map(float, said - asked), default=0.0)


def template_problems(
    template: int,
    generator: Generator,
    new: bool,
    seed: int,
    below: float,
    counts: dict[str, int],
    wordings: bool = False,
) -> list[dict]:
    """The problems of one template, none of them twice; none if it does not fit."""
    rng = random.Random(f"gsm {template} {seed}")
    probed = [draw(template, generator, rng, wordings) for _ in range(PROBED)]
    if not all(fits(record) and record["answer"] is not None for record in probed):
        return []
    if not new and sorted(map(computed, probed))[int(MOSTLY * PROBED)] >= below:
        return []
    wanted = {name: n for name, n in counts.items() if (name == "new_template") == new}
    chosen: dict[str, list[dict]] = {name: [] for name in wanted}
    seen = set()
    for _ in range(TRIES * sum(wanted.values())):
        record = draw(template, generator, rng, wordings)
        if record["prompt"] in seen or not fits(record):
            continue
        seen.add(record["prompt"])
        # The smaller splits are filled first: a template with few problems still has some of each
        names = ["new_template"] if new else ["test"] if is_held_out(record) else TRAINING
        open_names = [name for name in names if len(chosen[name]) < wanted[name]]
        if open_names:
            chosen[open_names[0]].append({**record, "split": open_names[0]})
        if all(len(chosen[name]) == count for name, count in wanted.items()):
            break
    return [record for records in chosen.values() for record in records]


TRAINING = ["distill", "train"]


def all_problems(
    seed: int = 0,
    below: float = math.inf,
    counts: dict[str, int] | None = None,
    only: list[int] | None = None,
    wordings: bool = False,
) -> list[dict[str, Any]]:
    """`counts`: problems of each template in a split, where not those of COUNTS. `only`: the
    templates that are not held out whole, where not all. `wordings`: see `wording.py`."""
    counts = {**COUNTS, **(counts or {})}
    problems = []
    for place, (template, generator) in enumerate(generators().items()):
        new = place % NEW_TEMPLATE_ONE_IN == NEW_TEMPLATE_ONE_IN - 1
        if not new and only is not None and template not in only:
            continue
        problems += template_problems(template, generator, new, seed, below, counts, wordings)
    random.Random(seed).shuffle(problems)
    return problems


def write_problems(path: Path, problems: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(record) + "\n" for record in problems).encode()
    if path.suffix == ".gz":
        text = gzip.compress(text, mtime=0)
    write_atomically(path, lambda file: file.write_bytes(text))


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dmax_kernels.gsm.problems", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE")
    parser.add_argument("--seed", type=int, default=0)
    for split in SEEN_SPLITS:
        parser.add_argument(
            f"--{split}",
            type=int,
            default=COUNTS[split],
            metavar="N",
            help=f'problems of each template in the split "{split}" (default: %(default)s)',
        )
    parser.add_argument(
        "--below",
        type=float,
        default=math.inf,
        metavar="X",
        help="only templates whose computed numbers stay below X in nine problems of ten (default: "
        "all; a base model of 2,000 steps on all wrote every text right and most numbers wrong)",
    )
    parser.add_argument(
        "--templates",
        type=int,
        nargs="+",
        metavar="N",
        help="only these templates, and those that are held out whole (default: all)",
    )
    parser.add_argument(
        "--wordings",
        action="store_true",
        help="word every chain of thought in one of many ways, drawn anew (default: as the "
        "template does)",
    )
    args = parser.parse_args()
    try:
        check_output("--output", args.output)
        counts = {split: getattr(args, split) for split in SEEN_SPLITS}
        for split, count in counts.items():
            if count < 1:
                raise ValueError(f"--{split} must be at least 1, got {count}")
        problems = all_problems(args.seed, args.below, counts, args.templates, args.wordings)
        write_problems(args.output, problems)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    templates = len({record["template"] for record in problems})
    print(f"wrote {args.output}: {len(problems)} problems of {templates} templates")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
