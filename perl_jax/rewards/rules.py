"""Rewards that are rules: of the text alone, or of the text and its row; the same text gets the
same reward.

Each rule is a frozen dataclass called with the batch, `rule(prompts, responses, rows)`, and gives a
float64 array of shape [n]. `RULES` is the table of their names.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from perl_jax import errors
from perl_jax.errors import UserError, one_of, positive, require
from perl_jax.rewards import checks

Row = Mapping[str, Any]

SHOWN = 80  # characters of a prompt in a message

UNITS: Mapping[str, Callable[[str], int]] = {
    "words": lambda text: len(text.split()),
    "characters": len,
}
MODES: Mapping[str, Callable[[re.Pattern, str], re.Match | None]] = {
    "search": re.Pattern.search,
    "fullmatch": re.Pattern.fullmatch,
}


@dataclasses.dataclass(frozen=True)
class Length:
    """max(-1, -excess / scale), excess = max(minimum - n, n - maximum, 0): 0 inside [minimum,
    maximum].

    Attributes:
        minimum: Least length that costs nothing.
        maximum: Largest length that costs nothing; None: no bound.
        unit: n counts words (split at white space) or characters (Unicode code points).
        scale: The excess, in units, that costs 1, which is also the most it can cost.
    """

    minimum: int = 0
    maximum: int | None = None
    unit: str = "words"
    scale: float = 20.0

    def __post_init__(self) -> None:
        checks.count("length.minimum", self.minimum, 0)
        if self.maximum is not None:
            checks.count("length.maximum", self.maximum, self.minimum)
        bounded = self.minimum > 0 or self.maximum is not None
        require(
            bounded,
            "length has neither minimum nor maximum; without a bound it is always 0, so give one "
            "of them.",
        )
        one_of("length.unit", self.unit, UNITS)
        positive("length.scale", self.scale)

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], rows: Sequence[Row]
    ) -> np.ndarray:
        return np.array([self.reward(response) for response in responses], np.float64)

    def reward(self, response: str) -> float:
        n = UNITS[self.unit](response)
        above = 0 if self.maximum is None else n - self.maximum
        excess = max(self.minimum - n, above, 0)
        return max(-1.0, -excess / self.scale)


@dataclasses.dataclass(frozen=True)
class Format:
    """1 if the response is one JSON value and nothing else but white space around it, else 0.

    NaN and Infinity are not JSON, and nesting too deep for Python's parser counts as none.

    Attributes:
        keys: If given, the value must be an object that has these keys.
    """

    keys: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        checks.texts("format.keys", self.keys)

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], rows: Sequence[Row]
    ) -> np.ndarray:
        return np.array([self.fits(response) for response in responses], np.float64)

    def fits(self, response: str) -> bool:
        try:
            # Numbers stay text: Python refuses to convert integers of thousands of digits.
            value = json.loads(response, parse_constant=refuse, parse_int=str, parse_float=str)
        except (ValueError, RecursionError):
            return False
        return not self.keys or (isinstance(value, dict) and all(key in value for key in self.keys))


def refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


@dataclasses.dataclass(frozen=True)
class Regex:
    """1 if the pattern is found in the response (search) or is all of it (fullmatch), else 0.

    Attributes:
        pattern: In Python's `re` syntax; flags are written inside, such as (?i) or (?s). There is
            no
            time-out: nested repetitions such as (a+)+ can take for ever on a long response.
        mode: search or fullmatch.
    """

    pattern: str
    mode: str = "search"

    def __post_init__(self) -> None:
        checks.text("regex.pattern", self.pattern)
        one_of("regex.mode", self.mode, MODES)
        try:
            re.compile(self.pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise UserError(
                f"regex.pattern is {self.pattern!r}, which is not a regular expression: {error}."
            ) from error

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], rows: Sequence[Row]
    ) -> np.ndarray:
        pattern, match = re.compile(self.pattern), MODES[self.mode]
        return np.array(
            [match(pattern, response) is not None for response in responses], np.float64
        )


@dataclasses.dataclass(frozen=True)
class ExactMatch:
    """1 if the response is the row's answer, else 0; a row's number is compared as it is printed.

    A row without an answer, or with an empty one, is an error: else an empty response would be
    right.

    Attributes:
        field: The row's field that holds the answer: any column of the prompts.
        strict: Compare as it is; otherwise case and runs of white space make no difference.
    """

    field: str = "answer"
    strict: bool = False

    def __post_init__(self) -> None:
        checks.text("exact_match.field", self.field)
        checks.flag("exact_match.strict", self.strict)

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], rows: Sequence[Row]
    ) -> np.ndarray:
        answers = [self.answer(row, index) for index, row in enumerate(rows)]
        form = str if self.strict else normalised
        return np.array(
            [form(r) == form(a) for r, a in zip(responses, answers, strict=True)], np.float64
        )

    def check_rows(self, rows: Iterable[Row]) -> None:
        """UserError naming the first row without an answer."""
        for index, row in enumerate(rows):
            self.answer(row, index)

    def answer(self, row: Row, index: int) -> str:
        # The prompt too: in a batch the index says little.
        where = f"Row {index} ({row['prompt'][:SHOWN]!r})" if "prompt" in row else f"Row {index}"
        has = ", ".join(map(str, row)) or "no field at all"
        require(
            self.field in row,
            f"{where} has no field {self.field!r} (exact_match.field) to compare with; it has "
            f"{has}.",
        )
        value = row[self.field]
        good = errors.is_number(value) or (isinstance(value, str) and bool(value.strip()))
        require(
            good,
            f"{where}: the field {self.field} is {value!r}; exact_match needs a text that is not "
            "empty, or a number.",
        )
        return str(value)


def normalised(text: str) -> str:
    """Without case (Unicode case folding), white space at the ends, and with single spaces
    inside.
    """
    return " ".join(text.casefold().split())


@dataclasses.dataclass(frozen=True)
class Words:
    """min(occurrences, most) / most, over the occurrences of any of the words, in any case.

    Whole words only: no letter, digit or underscore may touch them. An item of several words is
    found as a phrase; where two items begin at the same place, the longer one counts, once.

    Attributes:
        words: What to look for.
        most: The number of occurrences that earns 1.
    """

    words: tuple[str, ...]
    most: int = 1

    def __post_init__(self) -> None:
        checks.texts("words.words", self.words)
        require(
            len(self.words) > 0, "words.words is empty; it must be a list of at least one word."
        )
        checks.count("words.most", self.most, 1)

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], rows: Sequence[Row]
    ) -> np.ndarray:
        longest_first = sorted((normalised(word) for word in self.words), key=len, reverse=True)
        pattern = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)")
        found = [sum(1 for _ in pattern.finditer(normalised(response))) for response in responses]
        return np.minimum(np.array(found, np.float64), self.most) / self.most


RULES: Mapping[str, type] = {
    "length": Length,
    "format": Format,
    "regex": Regex,
    "exact_match": ExactMatch,
    "words": Words,
}
