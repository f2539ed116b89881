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
from decimal import Decimal
from typing import Any

import numpy as np

from perl_jax import errors
from perl_jax.errors import one_of, positive, require
from perl_jax.rewards import answers, checks, patterns
from perl_jax.rewards.answers import normalised

Row = Mapping[str, Any]

SHOWN = 80  # characters of a prompt that a message quotes

UNITS: Mapping[str, Callable[[str], int]] = {
    "words": lambda text: len(text.split()),
    "characters": len,
}
MODES = ("search", "fullmatch")


@dataclasses.dataclass(frozen=True)
class Length:
    """Rewards a length n in [minimum, maximum] with 0, any other with max(-1, -excess / scale).

    excess = max(minimum - n, n - maximum, 0).

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
        checks.require_count("length.minimum", self.minimum, 0)
        if self.maximum is not None:
            checks.require_count("length.maximum", self.maximum, self.minimum)
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
        """Returns the rewards of n responses, float64 [n] in [-1, 0]; `prompts` and `rows` are not
        read.
        """
        return np.array([self.reward(response) for response in responses], np.float64)

    def reward(self, response: str) -> float:
        """Returns the reward of one response."""
        n = UNITS[self.unit](response)
        above = 0 if self.maximum is None else n - self.maximum
        excess = max(self.minimum - n, above, 0)
        return max(-1.0, -excess / self.scale)


@dataclasses.dataclass(frozen=True)
class Format:
    """Rewards a response that is one JSON value with 1, any other with 0. White space around it is
    allowed.

    NaN and Infinity are not valid JSON. Nesting too deep for Python's parser earns 0.

    Attributes:
        keys: If not empty, the value must be an object with these keys; other keys are allowed.
    """

    keys: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        checks.require_texts("format.keys", self.keys)

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], rows: Sequence[Row]
    ) -> np.ndarray:
        """Returns the rewards of n responses, float64 [n] of 0 and 1; `prompts` and `rows` are not
        read.
        """
        return np.array([self.fits(response) for response in responses], np.float64)

    def fits(self, response: str) -> bool:
        """Returns whether a response is one JSON value and has the keys `keys`."""
        try:
            # Numbers stay text: Python refuses to convert integers of thousands of digits.
            value = json.loads(
                response, parse_constant=refuse_constant, parse_int=str, parse_float=str
            )
        except (ValueError, RecursionError):
            return False
        return not self.keys or (isinstance(value, dict) and all(key in value for key in self.keys))


def refuse_constant(constant: str) -> None:
    """Raises ValueError; called by Python's JSON parser for NaN and Infinity, which it would
    accept.
    """
    raise ValueError(f"{constant} is not JSON")


@dataclasses.dataclass(frozen=True)
class Regex:
    """Rewards a response that the pattern is found in (`search`) or matches whole (`fullmatch`)
    with 1, any other with 0.

    Attributes:
        pattern: A pattern in the syntax of Python's `re`; flags are written inside, such as (?i) or
            (?s). A search that takes longer than 5 s is an error.
        mode: `search` or `fullmatch`.
    """

    pattern: str
    mode: str = "search"

    def __post_init__(self) -> None:
        patterns.check_pattern("regex.pattern", self.pattern)
        one_of("regex.mode", self.mode, MODES)

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], rows: Sequence[Row]
    ) -> np.ndarray:
        """Returns the rewards of n responses, float64 [n] of 0 and 1; `prompts` and `rows` are not
        read.

        Raises UserError if a search takes too long.
        """
        whole = self.mode == "fullmatch"
        return np.array(
            [
                patterns.matches("regex.pattern", self.pattern, response, index, whole)
                for index, response in enumerate(responses)
            ],
            np.float64,
        )


@dataclasses.dataclass(frozen=True)
class ExactMatch:
    """Rewards a response that equals the row's answer with 1, any other with 0.

    The response may be text around an answer: `extract` or `pattern` finds the answer in it. They
    are used on the row's answer too, which is taken whole if they find nothing there. A response
    without an answer earns 0. Answers that were found are compared as numbers if both are numbers.

    An answer that is a number is read as Python prints it. A row without an answer, or with an
    empty one, is an error; otherwise an empty response would be rewarded.

    Attributes:
        field: The field of the row that holds the answer; it may be any column of the prompts.
        strict: Whether to compare exactly; by default case, runs of white space and variants of a
            Unicode character (NFKC) make no difference.
        keep_case: Whether case makes a difference without strict.
        extract: How the answer is found: `last_number` (1,234.50 is 1234.5), or `boxed`, what is in
            the last \\boxed{} of LaTeX; None: there is no such search.
        pattern: A regular expression whose last match is the answer, or its group if it has one;
            None: there is none.
    """

    field: str = "answer"
    strict: bool = False
    keep_case: bool = False
    extract: str | None = None
    pattern: str | None = None

    def __post_init__(self) -> None:
        checks.require_text("exact_match.field", self.field)
        for field in ("strict", "keep_case"):
            checks.require_flag(f"exact_match.{field}", getattr(self, field))
        if self.extract is not None:
            one_of("exact_match.extract", self.extract, answers.EXTRACT)
        if self.pattern is not None:
            patterns.check_pattern("exact_match.pattern", self.pattern)
            patterns.require_groups("exact_match.pattern", self.pattern)
        require(
            self.extract is None or self.pattern is None,
            "exact_match has extract and pattern; give one of them.",
        )
        numbers = "exact_match with extract last_number compares numbers"
        for field in ("strict", "keep_case"):
            require(
                not getattr(self, field) or self.extract != "last_number",
                f"{numbers}; leave {field} out.",
            )
        require(
            not (self.strict and self.keep_case),
            "exact_match.strict compares case too; leave keep_case out.",
        )

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], rows: Sequence[Row]
    ) -> np.ndarray:
        """Returns the rewards of n responses, float64 [n] of 0 and 1.

        Args:
            prompts: Not read.
            responses: The n responses as text.
            rows: The row of each response, which holds its answer.

        Raises:
            UserError: A row has no answer, or a search takes too long.
        """
        expected = [self.answer(row, index) for index, row in enumerate(rows)]
        pairs = zip(responses, expected, strict=True)
        return np.array([self.equal(*pair, index) for index, pair in enumerate(pairs)], np.float64)

    def equal(self, response: str, answer: str, index: int) -> bool:
        """Returns whether a response, or the answer in it, equals an answer.

        Args:
            response: The response.
            answer: The row's answer.
            index: The row's number, for error messages.
        """
        given, wanted = self.found(response, index), self.found(answer, index)
        if given is None:
            return False
        wanted = answer if wanted is None else wanted
        if self.strict:
            return given == wanted
        if self.extract is None and self.pattern is None:
            return normalised(response, self.keep_case) == normalised(answer, self.keep_case)
        return answers.same(given, wanted, self.keep_case)

    def found(self, text: str, index: int) -> str | Decimal | None:
        """Returns the answer in a text, or the text if there is nothing to search for.

        Returns None if there is no answer in it, or an empty one.

        Args:
            text: The text.
            index: The row's number, for error messages.
        """
        if self.pattern is not None:
            found = patterns.last_match("exact_match.pattern", self.pattern, text, index)
        elif self.extract is not None:
            found = answers.EXTRACT[self.extract](text)
        else:
            return text
        return None if isinstance(found, str) and not found.strip() else found

    def check_rows(self, rows: Iterable[Row]) -> None:
        """Raises UserError that names the first row without an answer."""
        for index, row in enumerate(rows):
            self.answer(row, index)

    def answer(self, row: Row, index: int) -> str:
        """Returns the row's answer as a string.

        Args:
            row: The row of a prompt.
            index: The row's number, for error messages.

        Raises:
            UserError: The answer is missing, blank, or neither a text nor a finite number, or has
                no number although numbers are compared.
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
        require(
            self.extract != "last_number" or answers.last_number(str(value)) is not None,
            f"{where}: the field {self.field} is {str(value)[:SHOWN]!r}, in which there is no "
            "number (exact_match.extract is last_number).",
        )
        return str(value)


@dataclasses.dataclass(frozen=True)
class Words:
    """Rewards occurrences of any of the words with min(occurrences, most) / most; case and variants
    of a Unicode character (NFKC) make no difference.

    Only whole words count: no letter, digit or underscore may touch a match. An entry of several
    words is a phrase. Where two entries begin at the same place, only the longer one counts.

    Attributes:
        words: The words or phrases to look for.
        most: The number of occurrences that earns the reward 1.
    """

    words: tuple[str, ...]
    most: int = 1

    def __post_init__(self) -> None:
        checks.require_texts("words.words", self.words)
        require(
            len(self.words) > 0, "words.words is empty; it must be a list of at least one word."
        )
        checks.require_count("words.most", self.most, 1)

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], rows: Sequence[Row]
    ) -> np.ndarray:
        """Returns the rewards of n responses, float64 [n] in [0, 1]; `prompts` and `rows` are not
        read.
        """
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
