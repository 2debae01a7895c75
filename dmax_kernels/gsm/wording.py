"""Other words for the same chain of thought, since a template always says it in the same ones.

A model of the templates alone knows every token from the problem, and decodes a block in one pass.
In real language a token also depends on the words chosen for the others. `reworded` brings a little
of that back: a line may begin with one of `OPENINGS`, whose lengths differ, an equation may be
turned round, and the operands of a sum or a product may come in any order. `plain` undoes it all.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable

OPENINGS = ("", "Hence ", "Next, ", "This means that ", "In other words, ", "Now we can say that ")
# Written small behind an opening; most other words at the beginning of a line are names
SMALL = re.compile(
    r"(?:A|After|All|Altogether|As|At|Each|Finally|First|For|From|He|Her|His|If|In|It|Its|Let|Of|On|"
    r"Once|Out|She|Since|So|The|Their|Then|There|These|They|This|Thus|To|When|With)\b"
)
AMOUNT = r"[$£€]?\d+(?:\.\d+)?"
OPERATOR = r" ?[-+*/x] ?"
TERMS = rf"{AMOUNT}(?:{OPERATOR}{AMOUNT})+"
EQUALS = r" ?= ?"
NOT_IN_TERMS = r"(?<![\w.$£€])(?<![-+*/x=])(?<![-+*/x=] )"
NOT_GOING_ON = r"(?!\.?\d)(?! ?[-+*/x=] ?[\w$£€])"
EQUATION = re.compile(
    rf"{NOT_IN_TERMS}(?:(?P<left>{TERMS})(?P<then>{EQUALS})(?P<result>{AMOUNT})"
    rf"|(?P<first>{AMOUNT})(?P<turned>{EQUALS})(?P<right>{TERMS})){NOT_GOING_ON}"
)


def reworded(text: str, rng: random.Random) -> str:
    """The lines of the text in words drawn anew; the line with the answer stays as it is."""

    def shuffled(amounts: list[str]) -> list[str]:
        rng.shuffle(amounts)
        return amounts

    def line(words: str) -> str:
        if words.startswith("####"):
            return words
        words = with_equations(words, shuffled, lambda: rng.random() < 0.5)
        opening = rng.choice(OPENINGS)
        if opening and SMALL.match(words):
            words = words[0].lower() + words[1:]
        return opening + words

    return "\n".join(map(line, text.split("\n")))


def plain(text: str) -> str:
    """One form for all wordings of a text: no openings, results last, operands in order."""

    def line(words: str) -> str:
        opening = max((each for each in OPENINGS if words.startswith(each)), key=len)
        words = with_equations(
            words.removeprefix(opening),
            lambda amounts: sorted(
                amounts, key=lambda amount: (float(amount.lstrip("$£€")), amount)
            ),
            lambda: False,
        )
        return words[:1].upper() + words[1:]

    return "\n".join(map(line, text.split("\n")))


def with_equations(
    words: str, order: Callable[[list[str]], list[str]], result_first: Callable[[], bool]
) -> str:
    """The words with each equation either way round, the operands of a sum or a product ordered."""

    def equation(match: re.Match[str]) -> str:
        if match["left"] is not None:
            terms, equals, result = match.group("left", "then", "result")
        else:
            result, equals, terms = match.group("first", "turned", "right")
        amounts, operators = re.findall(AMOUNT, terms), re.findall(rf"(?<=\d){OPERATOR}", terms)
        if len(set(operators)) == 1 and operators[0].strip() in "+*x":
            amounts = order(amounts)
        pairs = zip(["", *operators], amounts, strict=True)
        terms = "".join(operator + amount for operator, amount in pairs)
        return f"{result}{equals}{terms}" if result_first() else f"{terms}{equals}{result}"

    return EQUATION.sub(equation, words)
