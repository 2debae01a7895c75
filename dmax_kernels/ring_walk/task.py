"""The task of the tiny model: a walk on a ring of ten places, told step by step.

A problem is a start in 0..9 and n moves labelled s1..sn (u1, d1, u2, d2 = +1, -1, +2, -2 mod 10):

    prompt    ? ? s2 d1 s1 u2 start 4 =              labels shuffled, padded left to a whole block
    response  s1 so 4 u2 goes to 6 ; s2 6 d1 is 5 . answer 5 <eos>

A step is `label CONNECTIVE place move VERB place SEPARATOR`, and the end is `FINAL place <eos>`.
The phrases are drawn at random and differ in length: which word stands at a position depends on
every phrase before it, and independent guesses in parallel misalign. That is the failure that
OPUT and SPD are meant to repair.

Problems are split by a hash of (start, moves): a held-out walk never occurs in training, whatever
the order of its labels or its phrases.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dmax_kernels.evaluation.cells import Response

RING = 10
MOVES = {"u1": 1, "d1": -1, "u2": 2, "d2": -2}
MAX_MOVES = 8

# Phrase tables: (words, probability).
CONNECTIVES = (("", 0.45), ("so", 0.20), ("then we", 0.20), ("now let us", 0.15))
VERBS = (("goes to", 0.45), ("gives", 0.20), ("is", 0.15), ("leads us to", 0.20))
SEPARATORS = ((";", 0.50), (".", 0.30), (",", 0.20))
FINALS = (("answer", 0.50), ("so the answer is", 0.30), ("done with", 0.20))

PAD, MASK, EOS, UNK = "?", "<mask>", "<eos>", "<unk>"
WORDS = (
    *(PAD, MASK, EOS, UNK, "start", "="),
    *(str(place) for place in range(RING)),
    *MOVES,
    *(f"s{label}" for label in range(1, MAX_MOVES + 1)),
    *("so", "then", "we", "now", "let", "us", "goes", "to", "gives", "is", "leads"),
    *(";", ".", ",", "answer", "the", "done", "with"),
)
ID_OF = {word: i for i, word in enumerate(WORDS)}
PAD_ID, MASK_ID, EOS_ID, UNK_ID = (ID_OF[word] for word in (PAD, MASK, EOS, UNK))
PLACES = frozenset(str(place) for place in range(RING))

# One walk in this many is held out for evaluation.
HELD_OUT_ONE_IN = 8


@dataclass(frozen=True)
class Problem:
    """A walk: `moves[i]` has label s(i+1); `order` is the order in which the prompt lists them."""

    start: int
    moves: tuple[str, ...]
    order: tuple[int, ...]

    @property
    def places(self) -> list[int]:
        """Start, then the place after each move: n + 1 places."""
        places = [self.start]
        for move in self.moves:
            places.append((places[-1] + MOVES[move]) % RING)
        return places


@dataclass(frozen=True)
class Grade:
    """`answer`: the last place named is right. `strict`: the whole derivation is right too."""

    answer: bool
    strict: bool


def is_held_out(start: int, moves: Sequence[str]) -> bool:
    """Whether a walk is for evaluation, by a CRC-32, which is the same on every machine."""
    return zlib.crc32(f"{start} {' '.join(moves)}".encode()) % HELD_OUT_ONE_IN == 0


def draw_problem(rng: random.Random, num_moves: int, *, held_out: bool = False) -> Problem:
    """Draws a problem of the training side of the split, or of the held-out side."""
    if not 1 <= num_moves <= MAX_MOVES:
        raise ValueError(f"draw_problem: num_moves must be in 1..{MAX_MOVES}, got {num_moves}")
    names = tuple(MOVES)
    while True:
        start = rng.randrange(RING)
        moves = tuple(names[rng.randrange(len(names))] for _ in range(num_moves))
        if is_held_out(start, moves) == held_out:
            break
    order = list(range(num_moves))
    rng.shuffle(order)
    return Problem(start, moves, tuple(order))


def evaluation_problems(count: int, num_moves: int = 6, *, seed: int = 0) -> list[Problem]:
    """`count` held-out problems with distinct walks, the same for the same seed."""
    walks = product(range(RING), product(MOVES, repeat=num_moves))
    available = sum(is_held_out(start, moves) for start, moves in walks)
    if count > available:
        raise ValueError(
            f"evaluation_problems: count must be at most {available} for {num_moves} moves, "
            f"got {count}"
        )
    rng = random.Random(f"ring walk evaluation {seed}")
    problems: dict[tuple, Problem] = {}
    while len(problems) < count:
        problem = draw_problem(rng, num_moves, held_out=True)
        problems.setdefault((problem.start, problem.moves), problem)
    return list(problems.values())


def render_prompt(problem: Problem) -> list[str]:
    """The prompt's words, without padding: `s2 d1 s1 u2 start 4 =`."""
    words = []
    for label in problem.order:
        words += [f"s{label + 1}", problem.moves[label]]
    return [*words, "start", str(problem.start), "="]


def parse_prompt(text: str) -> Problem:
    """The problem of a prompt's text, as `render_prompt` wrote it; padding may stand before it."""
    words = [word for word in text.split() if word != PAD]
    pairs, end = words[:-3], words[-3:]
    labels, moves = pairs[::2], pairs[1::2]
    names = [f"s{i + 1}" for i in range(len(labels))]
    good = len(end) == 3 and end[0] == "start" and end[1] in PLACES and end[2] == "="
    if not good or sorted(labels) != names or not set(moves) <= set(MOVES) or not moves:
        raise ValueError(f"prompt must be a ring walk such as 's1 u1 start 2 =', got {text!r:.80}")
    order = tuple(int(label[1:]) - 1 for label in labels)
    by_label = dict(zip(order, moves, strict=True))
    return Problem(int(end[1]), tuple(by_label[i] for i in range(len(order))), order)


def render_response(problem: Problem, rng: random.Random) -> list[str]:
    """A right derivation with phrases drawn from the tables, up to and including `<eos>`."""
    words: list[str] = []
    places = problem.places
    for i, move in enumerate(problem.moves):
        words.append(f"s{i + 1}")
        words += draw_phrase(CONNECTIVES, rng)
        words += [str(places[i]), move]
        words += draw_phrase(VERBS, rng)
        words.append(str(places[i + 1]))
        words += draw_phrase(SEPARATORS, rng)
    words += draw_phrase(FINALS, rng)
    return [*words, str(places[-1]), EOS]


def encode(words: Sequence[str]) -> list[int]:
    """Token ids of words; a word that the vocabulary lacks is an error."""
    unknown = [word for word in words if word not in ID_OF]
    if unknown:
        raise ValueError(
            f"encode: words must be in the vocabulary of ring walks, got {unknown[0]!r}"
        )
    return [ID_OF[word] for word in words]


def decode(ids: Sequence[int]) -> list[str]:
    """Words of token ids."""
    return [WORDS[i] for i in ids]


def encode_prompt(problem: Problem, block_length: int) -> list[int]:
    """Token ids of the prompt, padded on the left with `?` to a whole number of blocks."""
    ids = encode(render_prompt(problem))
    return [PAD_ID] * (-len(ids) % block_length) + ids


def grade(problem: Problem, response: Sequence[str]) -> Grade:
    """Grade a response's words; whatever follows the first `<eos>` is ignored."""
    words = list(response)
    ended = EOS in words
    words = words[: words.index(EOS)] if ended else words
    named = [word for word in words if word in PLACES]
    answer = bool(named) and named[-1] == str(problem.places[-1])
    return Grade(answer=answer, strict=ended and _is_derivation(problem, words))


def grade_response(response: Response, record: dict[str, Any]) -> dict[str, bool]:
    """`grade` as `evaluate --grade` calls it, from a record with the problem's "prompt"."""
    return asdict(grade(parse_prompt(record["prompt"]), decode(response.token_ids)))


def record_of(problem: Problem) -> dict[str, str]:
    """The problem as a record of a file, which `evaluate` reads."""
    return {"prompt": " ".join(render_prompt(problem)), "answer": str(problem.places[-1])}


def _is_derivation(problem: Problem, words: list[str]) -> bool:
    """Whether the words are one of the derivations that `render_response` can write."""
    places = problem.places
    at = 0

    def take(*expected: str) -> bool:
        nonlocal at
        found = tuple(words[at : at + len(expected)]) == expected
        at += len(expected) if found else 0
        return found

    def take_phrase(table: tuple[tuple[str, float], ...], following: str) -> bool:
        # A place follows each phrase; only one of them can match.
        return any(take(*phrase.split(), following) for phrase, _ in table)

    for i, move in enumerate(problem.moves):
        right = (
            take(f"s{i + 1}")
            and take_phrase(CONNECTIVES, str(places[i]))
            and take(move)
            and take_phrase(VERBS, str(places[i + 1]))
            and any(take(separator) for separator, _ in SEPARATORS)
        )
        if not right:
            return False
    return take_phrase(FINALS, str(places[-1])) and at == len(words)


def draw_phrase(table: tuple[tuple[str, float], ...], rng: random.Random) -> list[str]:
    draw = rng.random()
    for phrase, probability in table:
        draw -= probability
        if draw < 0:
            return phrase.split()
    return table[-1][0].split()
