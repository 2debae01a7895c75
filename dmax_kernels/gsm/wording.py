"""Other words for the same chain of thought, since a template always says it in the same ones.

A model of the templates alone knows every token from the problem, and decodes a block in one pass.
In real language a token also depends on what was said before it. `reworded` brings a little of that
back: a line may begin with one of `OPENINGS`, whose lengths differ, an equation may be turned round,
and the operands of a sum or a product may come in any order. `plain` undoes all of it.
"""

from __future__ import annotations

import random
import re

OPENINGS = ("", "Hence ", "Next, ", "This means that ", "In other words, ", "Now we can say that ")
# Written small behind an opening; most other words at the beginning of a line are names
SMALL = frozenset(
    "A After All Altogether As At Each Finally First For From He Her His If In It Its Let Of On Once "
    "Out She Since So The Their Then There These They This Thus To When With".split()
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

    def equation(match: re.Match[str]) -> str:
        terms, equals, result = parts(match)
        amounts, operators = re.findall(AMOUNT, terms), re.findall(rf"(?<=\d){OPERATOR}", terms)
        if commutes(operators):
            rng.shuffle(amounts)
        terms = joined(amounts, operators)
        return f"{result}{equals}{terms}" if rng.random() < 0.5 else f"{terms}{equals}{result}"

    def line(words: str) -> str:
        if words.startswith("####"):
            return words
        words = EQUATION.sub(equation, words)
        opening = rng.choice(OPENINGS)
        if opening and words.split(" ")[0].rstrip(",") in SMALL:
            words = words[0].lower() + words[1:]
        return opening + words

    return "\n".join(map(line, text.split("\n")))


def plain(text: str) -> str:
    """One form for all wordings of a text: no openings, results last, operands in order."""

    def equation(match: re.Match[str]) -> str:
        terms, equals, result = parts(match)
        amounts, operators = re.findall(AMOUNT, terms), re.findall(rf"(?<=\d){OPERATOR}", terms)
        if commutes(operators):
            amounts.sort(key=lambda amount: (float(amount.lstrip("$£€")), amount))
        return f"{joined(amounts, operators)}{equals}{result}"

    def line(words: str) -> str:
        opening = max((each for each in OPENINGS if words.startswith(each)), key=len)
        words = EQUATION.sub(equation, words.removeprefix(opening))
        return words[:1].upper() + words[1:]

    return "\n".join(map(line, text.split("\n")))


def parts(match: re.Match[str]) -> tuple[str, str, str]:
    """The terms, the equals sign with its spaces, and the result of an equation either way round."""
    if match["left"] is not None:
        return match["left"], match["then"], match["result"]
    return match["right"], match["turned"], match["first"]


def commutes(operators: list[str]) -> bool:
    return len(set(operators)) == 1 and operators[0].strip() in "+*x"


def joined(amounts: list[str], operators: list[str]) -> str:
    pairs = zip(["", *operators], amounts, strict=True)
    return "".join(operator + amount for operator, amount in pairs)
