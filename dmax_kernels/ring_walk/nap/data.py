"""The texts: one derivation, several in a chain, and several side by side on a canvas.

A response fills RESPONSE positions, whatever it holds; what is left over are end-of-sequence
tokens. With 3 derivations ("traces") of the same walk, which differ in their phrases:

    base        s1 so 4 u2 goes to 6 ; ... answer 3 <eos> <eos> ...
    long_chain  s1 so 4 u2 ... answer 3 s1 4 u2 is 6 ... answer 3 s1 ... answer 3 so the answer is 3
    nap_3       <think1> s1 so 4 ... answer 3 <eos> ... </think1> <think2> ... </think2> <think3>
                ... </think3> <summary> answer 3 <eos> ... </summary>

A trace may be wrong (Figure 5 of the paper): in `NOISY` of them one place is false, and the trace
goes on from there. The summary is always right.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from dmax_kernels.decoding.extra import Canvas
from dmax_kernels.ring_walk import task
from dmax_kernels.training.data import Example

NUM_MOVES = 5
MOST_PATHS = 3
SUMMARY_LENGTH = 6  # the longest final phrase, the place and an end
RESPONSE = 170  # 1, 2 or 3 slots of 160, 79 or 52 tokens with their tags, and the summary with its
NOISY = 0.1
PATHS = {"nap_1": 1, "nap_2": 2, "nap_3": 3}  # m of the arms that learn a canvas
ARMS = ("base", "long_chain", *PATHS)

SUMMARY, SUMMARY_END = "<summary>", "</summary>"
TAGS = tuple(f"<{end}think{j}>" for j in range(1, MOST_PATHS + 1) for end in ("", "/"))
WORDS = (*task.WORDS, *TAGS, SUMMARY, SUMMARY_END)
ID_OF = {word: i for i, word in enumerate(WORDS)}


@dataclass(frozen=True)
class SlippedProblem(task.Problem):
    """A walk in which move `at` ends `by` places off, and everything after it too."""

    at: int
    by: int

    @property
    def places(self) -> list[int]:
        places = super().places
        return places[: self.at + 1] + [(p + self.by) % task.RING for p in places[self.at + 1 :]]


def slot_length(num_paths: int) -> int:
    """Tokens of each path: what its tags and the summary leave of the same total budget."""
    return (RESPONSE - SUMMARY_LENGTH - 2) // num_paths - 2


def canvas_of(num_paths: int) -> Canvas:
    slots = range(1, num_paths + 1)
    return Canvas.build(
        [[ID_OF[f"<think{j}>"]] for j in slots],
        [slot_length(num_paths)] * num_paths,
        [ID_OF[SUMMARY]],
        SUMMARY_LENGTH,
        closings=[[ID_OF[f"</think{j}>"]] for j in slots],
        summary_closing=[ID_OF[SUMMARY_END]],
    )


def draw_traces(problem: task.Problem, rng: random.Random) -> list[list[str]]:
    """Derivations of a problem, each short enough for the smallest slot."""
    traces: list[list[str]] = []
    while len(traces) < MOST_PATHS:
        told = problem
        if rng.random() < NOISY:
            at, by = rng.randrange(len(problem.moves)), rng.randrange(1, task.RING)
            told = SlippedProblem(**vars(problem), at=at, by=by)
        words = task.render_response(told, rng)[:-1]  # without <eos>
        if len(words) <= slot_length(MOST_PATHS):
            traces.append(words)
    return traces


def response_words(arm: str, problem: task.Problem, seed: str) -> list[str]:
    """What an arm learns to answer. All arms tell the traces of one draw."""
    rng = random.Random(f"{seed} {problem.start} {problem.moves} {problem.order}")
    traces = draw_traces(problem, rng)
    final = [*task.draw_phrase(task.FINALS, rng), str(problem.places[-1])]
    if arm == "base":
        words = task.render_response(problem, rng)[:-1]
        return filled(words, RESPONSE)
    if arm == "long_chain":
        return filled([*chain(*traces), *final], RESPONSE)
    length, words = slot_length(PATHS[arm]), []
    for j, trace in enumerate(traces[: PATHS[arm]], 1):
        words += [f"<think{j}>", *filled(trace, length), f"</think{j}>"]
    return [*words, SUMMARY, *filled(final, SUMMARY_LENGTH), SUMMARY_END]


def filled(words: list[str], length: int) -> list[str]:
    return [*words, *[task.EOS] * (length - len(words))]


def training_examples(arm: str, count: int, seed: int) -> list[Example]:
    """Distinct problems of the training side of the split, the same for every arm."""
    rng = random.Random(f"nap training {seed}")
    problems: dict[task.Problem, None] = {}
    while len(problems) < count:
        problems.setdefault(task.draw_problem(rng, NUM_MOVES))
    return [
        Example(prompt_ids(problem), encode(response_words(arm, problem, f"nap {seed}")))
        for problem in problems
    ]


def encode(words: Sequence[str]) -> tuple[int, ...]:
    return tuple(ID_OF[word] for word in words)


def prompt_ids(problem: task.Problem) -> tuple[int, ...]:
    """Without padding: prompts of one number of moves have one length."""
    return encode(task.render_prompt(problem))


def final_place(answer: Sequence[int]) -> str | None:
    """The last place that an answer names: in its summary, if it has one, before an end."""
    words = [WORDS[token] for token in answer]
    if SUMMARY in words:
        words = words[words.index(SUMMARY) + 1 :]
    for end in (SUMMARY_END, task.EOS):
        words = words[: words.index(end)] if end in words else words
    named = [word for word in words if word in task.PLACES]
    return named[-1] if named else None
