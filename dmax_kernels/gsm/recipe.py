"""The whole recipe, from nothing to the base model and the four that are trained on its responses.

See `stages.py`. Every stage is a training run in OUTPUT/stages/NAME, and every measured row is a
line of rows.jsonl; the same call continues what it finds there. The arms are trained and all rows
measured by several processes at a time.
"""

from __future__ import annotations

import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from dmax_kernels.decoding import DecodeConfig
from dmax_kernels.decoding.rules import find_rule
from dmax_kernels.evaluation.cells import Cell, Problem, Response, run_cell
from dmax_kernels.files import save_json
from dmax_kernels.gsm import task
from dmax_kernels.gsm.bundle import Bundle
from dmax_kernels.gsm.place import Place
from dmax_kernels.gsm.rows import ROWS, Row, append_row, read_rows, spread_over_templates
from dmax_kernels.gsm.stages import GIVEN
from dmax_kernels.models.machine import device_name
from dmax_kernels.models.workers import run_tasks
from dmax_kernels.ring_walk.recipe import versions
from dmax_kernels.training import distill as answering
from dmax_kernels.training.data import Example

LOG = "training_log.json"
MEASURED_SPLITS = ("test", "new_template")


def run_recipe(place: Place, *, workers: int, threads: int, command: str = "") -> dict[str, Any]:
    """Writes EXPORT/{base,oput,control,uniform,certainty}.safetensors, the log and the rows."""
    started = time.perf_counter()
    check_cells(place)
    for folder in (place.output / "stages", place.export):
        folder.mkdir(parents=True, exist_ok=True)  # fails now if it cannot be written
    log: dict[str, Any] = {
        "command": command,
        "ops": place.ops,
        "versions": versions(),
        "device": device_name(place.device),
        "words": len(place.words),
        "parameters": place.build_model().num_parameters(),
        "stages": {},
    }

    def save() -> None:
        log["seconds"] = round(time.perf_counter() - started, 1)
        save_json(place.export / LOG, log)

    train_bases(place, log, save)
    answers = distill(place)
    log["distillation"] = distillation_log(place, answers)
    save()
    learnt = learnt_templates(place, answers)
    export_task(place, learnt)
    if learnt:
        examples = distilled_examples(place, answers, learnt)
        if not examples:
            need = f"complete some of its {len(answers)} answers for the others to learn from"
            raise ValueError(f"the base model must {need}, got none: it needs more steps")
        # A new place, because the caches of this one would be sent along. The base comes last: it
        # is only measured.
        work = partial(worker, replace(place), examples, learnt)
        names = (*place.recipe.models[1:], "base")
        for name, result in run_tasks(work, names, workers=workers, threads=threads):
            if result is not None:
                log["stages"][name] = result
            save()
    save()
    return log


def train_bases(place: Place, log: dict[str, Any], save: Callable[[], None]) -> None:
    if place.base is not None:
        file = place.base / "base.safetensors"
        whole = Bundle.open(place.base).model("base").state_dict()
        place.write_weights(GIVEN if place.recipe.bases else "base", whole, {})
        log["base"] = f"crc {zlib.crc32(file.read_bytes()):08x}"
    if not place.recipe.bases:
        return
    examples = place.examples(place.splits["train"])
    for stage in place.recipe.bases:
        log["stages"][stage.name] = place.train(stage, examples)
        save()


def export_task(place: Place, learnt: list[int]) -> None:
    """What decodes and grades the exported models, see `bundle.py`."""
    problems = {split: measured_problems(place, split, learnt) for split in MEASURED_SPLITS}
    Bundle(place.export, place.words, dict(place.recipe.sizes), learnt, problems).save()


def check_cells(place: Place) -> None:
    """Refuses rules that do not exist before minutes of training."""
    for cells in place.recipe.cells.values():
        for rule, tau in cells:
            find_rule(DecodeConfig(**place.options, rule=rule, tau_dec=tau))


def answer_log(place: Place) -> answering.AnswerLog:
    recipe = place.recipe
    settings = {
        "threshold": recipe.distill_threshold,
        "problems": len(distill_records(place)),
        "base": zlib.crc32((place.output / "weights" / "base.safetensors").read_bytes()),
        "data": f"crc {place.data_crc:08x}",
    }
    return answering.AnswerLog(place.output / "stages" / "distillation", settings)


def distill_records(place: Place) -> list[dict[str, Any]]:
    return place.splits["distill"][: place.recipe.distill_problems]


def distill(place: Place) -> list[answering.Answer]:
    """The base model's answers to the file's "distill" problems, as token ids."""
    prompts = [place.vocabulary.prompt(record) for record in distill_records(place)]
    tau = place.recipe.distill_threshold
    options = {**place.options, "rule": "threshold", "tau_dec": tau}
    model = place.model("base")

    def answer_batches(indexes: list[list[int]]) -> Iterator[list[answering.Answer]]:
        for batch in indexes:
            yield answering.decode_batch(model, [prompts[i] for i in batch], batch, options)

    answers = answer_log(place)
    answering.distill(answers, len(prompts), place.recipe.distill_batch, answer_batches)
    return list(answers.answers())


def shares_right(place: Place, answers: list[answering.Answer]) -> dict[int, float]:
    """The share of right final numbers among the base model's answers, of each template."""
    right: dict[int, list[bool]] = defaultdict(list)
    for answer in answers:
        record = place.splits["distill"][answer.index]
        text = place.tokenizer.decode(answer.response, skip_special_tokens=True)
        graded = task.grade(Response(answer.response, answer.complete, text), record)
        right[record["template"]].append(graded["answer"])
    return {template: sum(each) / len(each) for template, each in sorted(right.items())}


def learnt_templates(place: Place, answers: list[answering.Answer]) -> list[int]:
    """Those of which the base model gets enough right, or the best ones if these are too few."""
    shares = shares_right(place, answers)
    best = sorted(shares, key=lambda template: (-shares[template], template))
    enough = sum(share >= place.recipe.learnt for share in shares.values())
    return sorted(best[: max(enough, place.recipe.least)])


def distillation_log(place: Place, answers: list[answering.Answer]) -> dict[str, Any]:
    counts = answering.Counts().add(answers)
    return {
        **asdict(counts),
        "share_right": {k: round(v, 3) for k, v in shares_right(place, answers).items()},
        "learnt": learnt_templates(place, answers),
    }


def distilled_examples(
    place: Place, answers: list[answering.Answer], learnt: list[int]
) -> list[Example]:
    """Complete responses to problems of learnt templates, right or wrong."""
    records = place.splits["distill"]
    return [
        Example(tuple(place.vocabulary.prompt(records[answer.index])), tuple(answer.response))
        for answer in answers
        if answer.complete and records[answer.index]["template"] in learnt
    ]


def worker(place: Place, examples: list[Example], learnt: list[int], number: int) -> Any:
    """The work of one process: from a model's name to its training's log, its rows on the way."""

    def work(name: str) -> dict[str, Any] | None:
        result = None
        for stage in place.recipe.arms:
            if stage.name == name:
                result = place.train(stage, examples)
        measure(place, name, learnt)
        return result

    return work


def measured_problems(place: Place, split: str, learnt: list[int]) -> list[dict[str, Any]]:
    """Test problems of learnt templates, or problems of templates that no model has seen."""
    records = place.splits[split]
    if split == "test":
        records = [record for record in records if record["template"] in learnt]
    return spread_over_templates(records, place.recipe.measured)


def measure(place: Place, name: str, learnt: list[int]) -> None:
    """Appends the model's rows to the file of rows, except those that are there."""
    there = {row.key for row in read_rows(place.export / ROWS)}
    model = place.model(name)
    cells_of = (place.recipe.cells, place.recipe.new_cells)
    for split, cells in zip(MEASURED_SPLITS, cells_of, strict=True):
        records = measured_problems(place, split, learnt)
        problems = [Problem(place.vocabulary.prompt(record), record) for record in records]
        for rule, tau in cells.get(name, ()):
            cell = Cell(name, rule, tau)
            if problems and (split, cell) not in there:
                outcome = run_cell(
                    *(model, place.tokenizer, problems, cell, task.grade, place.options),
                    batch_size=place.recipe.measured_batch,
                )
                row = Row(split, cell, outcome)
                append_row(place.export / ROWS, row)
                print(row, flush=True)
