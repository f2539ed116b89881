"""Rewards computed by rules from a response's text, or from its text and its row; they are
deterministic.

Each rule is a frozen dataclass. Calling it, `rule(prompts, responses, rows)`, returns float64 [n].
`RULES` maps names to rules.
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

SHOWN = 80  # characters of a prompt that a message quotes

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
    """max(-1, -excess / scale), where excess = max(minimum - n, n - maximum, 0) and n is the
    length.

    A length within [minimum, maximum] earns 0.

    Attributes:
        minimum: The least length without a penalty.
        maximum: The largest length without a penalty; None sets no bound.
        unit: What n counts: `words` (separated by white space) or `characters` (Unicode code
            points).
        scale: The excess, in units, at which the reward reaches its lowest value, -1.
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
        """Returns the rewards of the responses, float64 [n] in [-1, 0]."""
        return np.array([self.reward(response) for response in responses], np.float64)

    def reward(self, response: str) -> float:
        """Returns the reward of one response."""
        n = UNITS[self.unit](response)
        above = 0 if self.maximum is None else n - self.maximum
        excess = max(self.minimum - n, above, 0)
        return max(-1.0, -excess / self.scale)


@dataclasses.dataclass(frozen=True)
class Format:
    """1 if the response is one JSON value, with nothing else but white space around it; else 0.

    NaN and Infinity are not valid JSON. Nesting too deep for Python's parser earns 0.

    Attributes:
        keys: If given, the value must be an object with these keys.
    """

    keys: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        checks.texts("format.keys", self.keys)

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], rows: Sequence[Row]
    ) -> np.ndarray:
        """Returns the rewards of the responses, float64 [n] of 0 and 1."""
        return np.array([self.fits(response) for response in responses], np.float64)

    def fits(self, response: str) -> bool:
        """Returns whether a response is one JSON value and has the keys."""
        try:
            # Numbers stay text: Python refuses to convert integers of thousands of digits.
            value = json.loads(
                response, parse_constant=refuse_constant, parse_int=str, parse_float=str
            )
        except (ValueError, RecursionError):
            return False
        return not self.keys or (isinstance(value, dict) and all(key in value for key in self.keys))


def refuse_constant(constant: str) -> None:
    """Raises ValueError for NaN and Infinity, which Python's parser accepts."""
    raise ValueError(f"{constant} is not JSON")


@dataclasses.dataclass(frozen=True)
class Regex:
    """1 if the pattern is found in the response (`search`) or matches all of it (`fullmatch`); else
    0.

    Attributes:
        pattern: A pattern in the syntax of Python's `re`; flags are written inside, such as (?i) or
            (?s). There is no time-out: nested repetitions such as (a+)+ can run for ever on a long
            response.
        mode: `search` or `fullmatch`.
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
        """Returns the rewards of the responses, float64 [n] of 0 and 1."""
        pattern, match = re.compile(self.pattern), MODES[self.mode]
        return np.array(
            [match(pattern, response) is not None for response in responses], np.float64
        )


@dataclasses.dataclass(frozen=True)
class ExactMatch:
    """1 if the response equals the row's answer, else 0. An answer that is a number is compared as
    printed.

    A row without an answer, or with an empty one, is an error; otherwise an empty response would be
    rewarded.

    Attributes:
        field: The field of the row that holds the answer; it may be any column of the prompts.
        strict: Whether to compare exactly; by default case and runs of white space make no
            difference.
    """

    field: str = "answer"
    strict: bool = False

    def __post_init__(self) -> None:
        checks.text("exact_match.field", self.field)
        checks.flag("exact_match.strict", self.strict)

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], rows: Sequence[Row]
    ) -> np.ndarray:
        """Returns the rewards of the responses, float64 [n] of 0 and 1; raises UserError for a row
        without an answer.
        """
        answers = [self.answer(row, index) for index, row in enumerate(rows)]
        form = str if self.strict else normalised
        return np.array(
            [form(r) == form(a) for r, a in zip(responses, answers, strict=True)], np.float64
        )

    def check_rows(self, rows: Iterable[Row]) -> None:
        """Raises UserError naming the first row without an answer."""
        for index, row in enumerate(rows):
            self.answer(row, index)

    def answer(self, row: Row, index: int) -> str:
        """Returns the row's answer as a string; raises UserError if it is missing, empty or neither
        a text nor a number.
        """
        # Quote the prompt too: an index within a batch says little.
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
    """Returns the text case-folded (Unicode), stripped, and with runs of white space as single
    spaces.
    """
    return " ".join(text.casefold().split())


@dataclasses.dataclass(frozen=True)
class Words:
    """min(occurrences, most) / most, over the occurrences of any of the words; case is ignored.

    Only whole words count: no letter, digit or underscore may touch a match. An entry of several
    words is a phrase. Where two entries begin at the same place, only the longer one counts.

    Attributes:
        words: The words or phrases to look for.
        most: The number of occurrences that earns the reward 1.
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
        """Returns the rewards of the responses, float64 [n] in [0, 1]."""
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
