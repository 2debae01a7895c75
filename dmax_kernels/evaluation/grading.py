"""Which responses are right: by an answer that is extracted, or by a function of the user's."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

from dmax_kernels.evaluation.cells import Grade, Response

# The last number of a text: "1,234.5", "-3", ".5"
LAST_NUMBER = r"-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)"
PYTHON_NAME = r"[A-Za-z_][\w.]*:[A-Za-z_]\w*"


def find_function(option: str, name: str) -> Callable:
    """The function that "module:function" names."""
    module, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        need = "MODULE:FUNCTION that can be imported"
        raise ValueError(f"{option} must be {need}, got {name} ({error})") from None
    if not callable(function):
        raise ValueError(f"{option} must be a function, got {name}, a {type(function).__name__}")
    return function


@dataclass(frozen=True)
class Extracted:
    """Grades by one answer in the response's text; the measure is called "answer".

    extract: a regular expression, whose last match counts (its first group, if it has one), or
        "module:function", which takes the text and returns the answer, or None if there is none.
    field: the record's field with the right answer. Where `extract` finds an answer in it, that
        answer is meant: GSM8K's field holds the whole solution.
    """

    extract: str = LAST_NUMBER
    field: str = "answer"

    def __post_init__(self) -> None:
        self.find("")

    def find(self, text: str) -> str | None:
        if re.fullmatch(PYTHON_NAME, self.extract):
            found = find_function("--extract", self.extract)(text)
            if found is not None and not isinstance(found, str):
                need = "return a text or None"
                raise ValueError(f"--extract {self.extract} must {need}, got {found!r:.80}")
            return found
        try:
            matches = list(re.finditer(self.extract, text))
        except re.error as error:
            need = "a regular expression or MODULE:FUNCTION"
            raise ValueError(f"--extract must be {need}, got {self.extract} ({error})") from None
        return next(iter([*matches[-1].groups(), matches[-1].group()])) if matches else None

    def wanted(self, record: dict[str, Any]) -> str:
        answer = record.get(self.field)
        if isinstance(answer, bool) or not isinstance(answer, (str, int, float)):
            need = f'a text or number "{self.field}", the right answer'
            raise ValueError(f"must have {need}, got {answer!r:.80}")
        found = self.find(str(answer))
        return str(answer) if found is None else found

    def __call__(self, response: Response, record: dict[str, Any]) -> dict[str, bool]:
        found = self.find(response.text)
        return {"answer": found is not None and same_answer(found, self.wanted(record))}


def same_answer(one: str, other: str) -> bool:
    """Whether two answers are the same text or the same number ("1,234.0" is 1234)."""
    one, other = (" ".join(each.split()).strip("$ ").rstrip(".") for each in (one, other))
    numbers = as_decimal(one), as_decimal(other)
    return one == other or (None not in numbers and numbers[0] == numbers[1])


def as_decimal(text: str) -> Decimal | None:
    try:
        number = Decimal(text.replace(",", ""))
    except InvalidOperation:
        return None
    return number if number.is_finite() else None


@dataclass(frozen=True)
class Graded:
    """Grades by a function: of a `Response` and its record, to a bool or to a bool per measure."""

    name: str

    def __post_init__(self) -> None:
        if not re.fullmatch(PYTHON_NAME, self.name):
            raise ValueError(f"--grade must be MODULE:FUNCTION, got {self.name}")
        find_function("--grade", self.name)

    def __call__(self, response: Response, record: dict[str, Any]) -> dict[str, bool]:
        graded = find_function("--grade", self.name)(response, record)
        if isinstance(graded, bool):
            return {"answer": graded}
        flags = isinstance(graded, dict) and all(isinstance(v, bool) for v in graded.values())
        if not flags or not graded:
            need = "return a bool, or a dict with a bool for each measure"
            raise ValueError(f"--grade {self.name} must {need}, got {graded!r:.80}")
        return graded


def make_grade(extract: str | None, grade: str | None, field: str) -> Grade:
    if extract is not None and grade is not None:
        raise ValueError("--extract and --grade must not be given together, got both")
    if grade is not None:
        return Graded(grade)
    return Extracted(LAST_NUMBER if extract is None else extract, field)
