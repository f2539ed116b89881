"""Reads reward terms from JSON and adds them up: total = sum over terms of weight * reward.

A term is a rule, a Python function of the user, or a language-model judge (`KINDS`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from perl_jax.errors import UserError, one_of, require
from perl_jax.rewards import checks
from perl_jax.rewards.function import FunctionReward
from perl_jax.rewards.judge import Judge
from perl_jax.rewards.rules import RULES, ExactMatch, Row
from perl_jax.runtime import files

Reward = Callable[[Sequence[str], Sequence[str], Sequence[Row]], np.ndarray]

KINDS: Mapping[str, type] = MappingProxyType({**RULES, "function": FunctionReward, "judge": Judge})
# Keys that every term may have; its other keys are the fields of its kind.
COMMON = ("kind", "weight", "name", "special_tokens")


@dataclasses.dataclass(frozen=True)
class Term:
    """One named, weighted reward.

    Attributes:
        name: The term's key in the metrics, unique among the terms.
        weight: The factor of the reward in the total.
        reward: Maps (prompts, responses, rows) to one number per response, an array [n].
        special_tokens: Whether the reward gets responses with the special tokens in them, such as
            <think>; the tokens that end a response are left out in any case.
    """

    name: str
    weight: float
    reward: Reward
    special_tokens: bool = False

    def __post_init__(self) -> None:
        checks.require_text("name", self.name)
        checks.require_number("weight", self.weight)
        checks.require_flag("special_tokens", self.special_tokens)


def read_terms(source: files.PathLike | None) -> tuple[Term, ...]:
    """Returns the reward terms described by a JSON list, or by a JSON object for a single term.

        [{"kind": "length", "weight": 0.2, "maximum": 50},
         {"kind": "function", "function": "my.py:score"}]

    `kind` is a key of `KINDS`. `weight` defaults to 1, `name` to the kind and `special_tokens` to
    false (`Term`). All other keys are fields of the kind's class. Paths in the terms are relative
    to the working directory of the command.

    Args:
        source: The JSON text (`is_inline`), or the path of a file that holds it. None gives no
            terms.

    Raises:
        UserError: The file cannot be read, the JSON is not valid, or a term is wrong. The message
            gives the term's number, counted from 1, and the field.
    """
    if source is None:
        return ()
    inline = is_inline(source)
    where = "The reward terms" if inline else f"The file of reward terms {source}"
    values = parse(str(source) if inline else read(files.path_of(source)), where)
    values = [values] if isinstance(values, dict) else values
    require(
        isinstance(values, list) and bool(values),
        f"{where} must be a JSON object, or a list of at least one.",
    )
    terms = tuple(
        to_term(value, f"Reward term {number}") for number, value in enumerate(values, start=1)
    )
    check_names(terms)
    return terms


def is_inline(source: files.PathLike) -> bool:
    """Returns whether reward terms are given as JSON text, which begins with `[` or `{`, and not as
    the path of a file.
    """
    return str(source).lstrip().startswith(("[", "{"))


def read(path: files.PathLike) -> str:
    """Returns the text of a file of reward terms; raises UserError if the file cannot be read or is
    not UTF-8.
    """
    try:
        return files.read_text(path)
    except UserError as error:
        raise UserError(f"The file of reward terms {error}") from error


def parse(text: str, where: str) -> Any:
    """Returns the value of a JSON text.

    Args:
        text: The JSON text.
        where: What the text is, the beginning of an error message.

    Raises:
        UserError: The text is not valid JSON.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where}: not valid JSON, line {error.lineno}, column {error.colno}: {error.msg}."
        ) from error
    # An integer of thousands of digits, or brackets nested too deep for Python's parser.
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({error}).") from error


def to_term(value: Any, where: str) -> Term:
    """Returns the `Term` that a JSON object describes (`read_terms` gives the form).

    Args:
        value: The object.
        where: Which term it is, the beginning of an error message.

    Raises:
        UserError: The value is no object, its kind or a field is unknown, or a field is missing or
            wrong.
    """
    require(
        isinstance(value, dict),
        f"{where} is {value!r}; it must be an object with a kind, one of {', '.join(KINDS)}.",
    )
    require("kind" in value, f"{where} has no kind; it must be one of {', '.join(KINDS)}.")
    kind = value["kind"]
    one_of(f"{where}: kind", kind, KINDS)
    where = f"{where} ({kind})"
    fields = term_fields(KINDS[kind])
    names = [field.name for field in fields]
    unknown = [name for name in value if name not in names and name not in COMMON]
    require(
        not unknown,
        f"{where} has no field {', '.join(unknown)}; it has {', '.join(names)}, besides "
        f"{', '.join(COMMON)}.",
    )
    missing = [f.name for f in fields if f.default is dataclasses.MISSING and f.name not in value]
    require(
        not missing, f"{where} needs the field {', '.join(missing)}; it has {', '.join(names)}."
    )
    settings = {
        name: tuple(item) if isinstance(item, list) else item
        for name, item in value.items()
        if name not in COMMON
    }
    try:
        return Term(
            value.get("name", kind),
            value.get("weight", 1.0),
            KINDS[kind](**settings),
            value.get("special_tokens", False),
        )
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def kinds_text() -> str:
    """Returns the kinds of terms, each with its fields and their defaults, as lines of a help text.

    A field without a default must be given.
    """
    width = max(map(len, KINDS))
    lines = []
    for kind, cls in KINDS.items():
        shown = [
            field.name
            if field.default is dataclasses.MISSING
            else f"{field.name}={shown_default(field.default)}"
            for field in term_fields(cls)
        ]
        indent = " " * (width + 4)
        lines += textwrap.wrap(
            f"  {kind:<{width}}  {', '.join(shown)}",
            80,
            subsequent_indent=indent,
            break_long_words=False,
        )
    return "\n".join(lines)


def shown_default(value: Any) -> str:
    """Returns a default as JSON writes it; `...` for a long text."""
    return "..." if isinstance(value, str) and "\n" in value else json.dumps(value)


def term_fields(cls: type) -> list[dataclasses.Field]:
    """Returns the fields of a kind's class that a term may set."""
    return [field for field in dataclasses.fields(cls) if field.init]


def check_names(terms: Sequence[Term]) -> None:
    """Raises UserError if two terms have the same name."""
    names = [term.name for term in terms]
    twice = sorted({name for name in names if names.count(name) > 1})
    require(
        not twice,
        f"Two reward terms are called {', '.join(twice)}; give each a name of its own by the "
        "field name.",
    )


class Composite:
    """Evaluates several reward terms on a batch and computes their weighted sum.

    As a context manager it starts what the terms need (worker processes, API keys) on entry, so
    that a failure is reported before training, and stops it on exit.
    """

    def __init__(self, terms: Sequence[Term]) -> None:
        require(len(terms) > 0, "There are no reward terms; give at least one.")
        check_names(terms)
        self.terms = tuple(terms)
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Composite:
        with contextlib.ExitStack() as stack:  # stops the started terms if a later one fails
            for term in self.terms:
                if isinstance(term.reward, contextlib.AbstractContextManager):
                    stack.enter_context(term.reward)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    @property
    def special_tokens(self) -> bool:
        """Whether a term needs the responses with their special tokens."""
        return any(term.special_tokens for term in self.terms)

    def __call__(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        rows: Sequence[Row],
        special: Sequence[str] | None = None,
    ) -> dict[str, np.ndarray]:
        """Returns each term's unweighted rewards: {term name: float64 [n]}. An empty batch calls no
        term.

        Args:
            prompts: The n prompts as text.
            responses: The n responses as text.
            rows: The rows of the prompts.
            special: The n responses with their special tokens; None if no term needs them
                (`special_tokens`).

        Raises:
            UserError: A term fails, or does not return n finite numbers.
        """
        if special is None:
            if self.special_tokens:
                raise ValueError("a term needs the responses with their special tokens")
            special = responses
        checks.require_equal_lengths(prompts, responses, rows)
        if not len(responses):
            return {term.name: np.zeros(0, np.float64) for term in self.terms}
        columns = {}
        for term in self.terms:
            texts = special if term.special_tokens else responses
            columns[term.name] = checked_column(
                term, term.reward(prompts, texts, rows), len(responses)
            )
        return columns

    def check_rows(self, rows: Iterable[Row]) -> None:
        """Raises UserError, naming the term and the row, if a row lacks the answer that an
        exact-match term compares with.

        Call this before training, because the terms themselves get the rows only batch by batch.

        Args:
            rows: The rows of the prompts.
        """
        for term in self.terms:
            if isinstance(term.reward, ExactMatch):
                try:
                    term.reward.check_rows(rows)
                except UserError as error:
                    raise UserError(f"The reward term {term.name}: {error}") from error

    def total(self, columns: Mapping[str, np.ndarray]) -> np.ndarray:
        """Returns the weighted sum of the terms, sum_k weight_k * column_k: float64 [n].

        Args:
            columns: Each term's unweighted rewards [n] by its name, as calling the composite
                returns them.

        Raises:
            ValueError: The names are not those of the terms.
            UserError: A column does not hold n finite numbers.
        """
        names = [term.name for term in self.terms]
        if sorted(columns) != sorted(names):
            raise ValueError(
                f"the columns are {', '.join(columns)}; they must be those of the terms "
                f"{', '.join(names)}"
            )
        n = len(columns[names[0]])
        return sum(term.weight * checked_column(term, columns[term.name], n) for term in self.terms)


def checked_column(term: Term, values: np.ndarray, n: int) -> np.ndarray:
    """Returns a term's rewards as float64 [n].

    Args:
        term: The term, whose name error messages give.
        values: What the term returned.
        n: The number of responses.

    Raises:
        UserError: The values are not an array [n] of finite numbers.
    """
    column = np.asarray(values, np.float64)
    shape = f"returned an array of shape {column.shape}; it must be ({n},), one number a response"
    require(column.shape == (n,), f"The reward term {term.name} {shape}.")
    for index in np.flatnonzero(~np.isfinite(column))[:1]:
        raise UserError(
            f"The reward term {term.name} returned {column[index]} at index {index}; every reward "
            "must be finite."
        )
    return column
