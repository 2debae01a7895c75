"""Self-distillation: a model writes the responses that it is then trained on (section 4.1).

The responses are decoded by the confidence threshold. Each batch is appended to a log, so that a
run that was killed goes on where it was; incomplete responses are kept in the log and dropped from
the training data.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dmax_kernels.decoding import spd_generate
from dmax_kernels.evaluation.cells import in_batches, with_seeds
from dmax_kernels.files import read_json, save_json, write_atomically
from dmax_kernels.models.prompt_file import Prompt, encode_prompts
from dmax_kernels.models.workers import Models
from dmax_kernels.training.config import check_same_run

RUN = "run.json"  # the settings, in the log's folder
PART = "part-{:04d}.jsonl"  # what process number ... has answered


@dataclass(frozen=True)
class Answer:
    """One prompt's response, by the prompt's number.

    complete: whether it ended with an end-of-sequence token within the budget.
    """

    index: int
    complete: bool
    response: Any  # what the caller keeps: a text, or token ids
    tokens: int
    forwards: int
    seconds: float  # its share of its batch's


class AnswerLog:
    """The folder of a run: `run.json` and one append-only file of answers for each process.

    A line that was cut short when a process was killed is dropped, and its prompt answered again.

    Raises:
        ValueError: the folder belongs to a run with other settings or prompts.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], rank: int = 0) -> None:
        if (folder / RUN).exists():
            check_same_run(read_json(folder / RUN, "the run's record"), settings, folder)
        self.folder = folder
        self.settings = settings
        self.path = folder / PART.format(rank)
        if self.path.exists():
            data = self.path.read_bytes()
            whole = data.rfind(b"\n") + 1
            if whole < len(data):
                with self.path.open("rb+") as file:
                    file.truncate(whole)

    def places(self) -> dict[int, tuple[Path, int]]:
        """The file and the offset of every answer of all processes, by the prompt's number."""
        found = {}
        for path in sorted(self.folder.glob("part-*.jsonl")):
            offset = 0
            with path.open("rb") as file:
                for line in file:
                    if line.endswith(b"\n"):
                        found[json.loads(line)["index"]] = path, offset
                    offset += len(line)
        return found

    def answers(self, chosen: Callable[[int], bool] = lambda index: True) -> Iterator[Answer]:
        """The answers in the order of their prompts. One at a time is in memory."""
        places = self.places()
        with ExitStack() as stack:
            files: dict[Path, Any] = {}
            for index in filter(chosen, sorted(places)):
                path, offset = places[index]
                if path not in files:
                    files[path] = stack.enter_context(path.open("rb"))
                files[path].seek(offset)
                yield Answer(**json.loads(files[path].readline()))

    def add(self, answers: Sequence[Answer]) -> None:
        # The folder comes with its first answers: a run that failed before leaves nothing behind
        if not (self.folder / RUN).exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            save_json(self.folder / RUN, self.settings)
        lines = "".join(json.dumps(asdict(answer)) + "\n" for answer in answers)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(lines)


def distill(
    log: AnswerLog,
    num_prompts: int,
    batch_size: int,
    answer_batches: Callable[[list[list[int]]], Iterable[list[Answer]]],
    *,
    rank: int = 0,
    count: int = 1,
    progress: bool = True,
) -> None:
    """Answers the prompts that the log lacks.

    Of several processes, each takes every `count`-th batch. Which these are does not depend on the
    log, so that processes need not wait for each other, and a run may go on with other numbers.

    Args:
        answer_batches: from batches of prompts' numbers, the answers of each batch as they come.
    """
    done = log.places()
    own = list(in_batches(range(num_prompts), batch_size))[rank::count]
    left = [[i for i in batch if i not in done] for batch in own]
    counts = Counts().add(log.answers(lambda i: i // batch_size % count == rank))
    total = sum(map(len, own))
    with tqdm(
        total=total,
        initial=counts.answered,
        desc="distillation",
        unit="prompt",
        disable=not progress,
    ) as bar:
        for answers in answer_batches([batch for batch in left if batch]):
            log.add(answers)
            bar.set_postfix(counts.add(answers).shown(), refresh=False)
            bar.update(len(answers))


@dataclass
class Counts:
    """What a run has done, over its answers."""

    answered: int = 0
    complete: int = 0
    too_long: int = 0  # prompts that leave no room for an answer
    tokens: int = 0
    forwards: int = 0
    seconds: float = 0.0

    def add(self, answers: Iterable[Answer]) -> Counts:
        for answer in answers:
            self.answered += 1
            self.complete += answer.complete
            self.too_long += answer.forwards == 0
            self.tokens += answer.tokens
            self.forwards += answer.forwards
            self.seconds += answer.seconds
        return self

    @property
    def incomplete(self) -> int:
        return self.answered - self.complete - self.too_long

    @property
    def tokens_per_forward(self) -> float:
        return self.tokens / max(self.forwards, 1)

    def shown(self) -> dict[str, str]:
        return {
            "incomplete": str(self.incomplete),
            "t/f": f"{self.tokens_per_forward:.2f}",
            "tokens/s": f"{self.tokens / max(self.seconds, 1e-9):.0f}",
        }


def decode_batch(
    model: Any,
    encoded: list[list[int]],
    indexes: list[int],
    options: dict[str, Any],
    read: Callable[[list[int]], Any] = list,
) -> list[Answer]:
    """The answers to prompts of token ids; `read` makes of a response's ids what is kept of it."""
    started = time.perf_counter()
    output = spd_generate(model, encoded, **with_seeds(options, indexes))
    seconds = (time.perf_counter() - started) / len(indexes)
    forwards = output.num_forwards.tolist()
    return [
        Answer(i, ids[-1] in options["eos_token_id"], read(ids), len(ids), passes, seconds)
        for i, ids, passes in zip(indexes, output.answers, forwards, strict=True)
    ]


@dataclass(frozen=True)
class Answering:
    """How texts are answered, in a form that other processes can receive.

    options: of `spd_generate`; what the model's defaults say is filled in when it is loaded.
    """

    prompts: list[Prompt]
    options: dict[str, Any] = field(default_factory=dict)
    raw: bool = False
    pad: bool | None = None

    def __call__(self, models: Models, indexes: list[int]) -> list[Answer]:
        """One batch; the model is the only one of `models`."""
        loaded = models.get("model")
        options = loaded.decode_options(self.options)
        prompts = [self.prompts[i] for i in indexes]
        encoded = encode_prompts(loaded, prompts, raw=self.raw, pad=self.pad)
        room = longest_prompt(loaded.model.config, options)
        fits = [room is None or len(ids) <= room for ids in encoded]
        answers = [
            Answer(i, False, "", 0, 0, 0.0)
            for i, has_room in zip(indexes, fits, strict=True)
            if not has_room
        ]
        if any(fits):
            chosen = [encoded[i] for i, has_room in enumerate(fits) if has_room]
            numbers = [i for i, has_room in zip(indexes, fits, strict=True) if has_room]

            def read(ids: list[int]) -> str:
                return loaded.tokenizer.decode(ids, skip_special_tokens=True)

            answers += decode_batch(loaded.model, chosen, numbers, options, read)
        return answers


def longest_prompt(model_config: Any, options: dict[str, Any]) -> int | None:
    """The most tokens that a prompt may have for its answer to fit in the model's context."""
    context = getattr(model_config, "max_position_embeddings", None)
    if context is None:
        return None
    block, budget = options["block_length"], options["max_new_tokens"]
    room = context // block * block - budget
    if room < 1:
        need = f"less than the model's context of {context}, for the prompt"
        raise ValueError(f"--max-new-tokens must be {need}, got {budget}")
    return room


def write_training_data(path: Path, prompts: list[Prompt], log: AnswerLog) -> int:
    """The file that `train --data` reads: each prompt's record with its response, if complete.

    A record keeps its other fields. A response without a visible character is left out: `train`
    could learn nothing from it. Returns the number of records.
    """
    kept = 0

    def write(temporary: Path) -> None:
        nonlocal kept
        with temporary.open("w", encoding="utf-8") as file:
            for answer in log.answers():
                if answer.complete and answer.response.strip():
                    record = with_response(prompts[answer.index], answer.response)
                    file.write(json.dumps(record) + "\n")
                    kept += 1

    write_atomically(path, write)
    return kept


def with_response(prompt: Prompt, response: str) -> dict[str, Any]:
    if isinstance(prompt.record.get(prompt.field), str):
        (message,) = prompt.messages
        return {**prompt.record, "prompt": message["content"], "response": response}
    answered = [*prompt.messages, {"role": "assistant", "content": response}]
    return {**prompt.record, "messages": answered}
