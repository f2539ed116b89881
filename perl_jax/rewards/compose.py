"""A reward as a weighted sum of named terms, read from JSON: rules, functions of the user,
judges.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from perl_jax.errors import UserError, one_of, require
from perl_jax.rewards import checks
from perl_jax.rewards.function import FunctionReward
from perl_jax.rewards.judge import Judge
from perl_jax.rewards.rules import RULES, ExactMatch, Row

Reward = Callable[[Sequence[str], Sequence[str], Sequence[Row]], np.ndarray]

KINDS: Mapping[str, type] = MappingProxyType({**RULES, "function": FunctionReward, "judge": Judge})
COMMON = ("kind", "weight", "name")  # of every term; the rest are the fields of its kind


@dataclasses.dataclass(frozen=True)
class Term:
    """weight * reward(prompts, responses, rows), under a name of its own in the metrics."""

    name: str
    weight: float
    reward: Reward

    def __post_init__(self) -> None:
        checks.text("name", self.name)
        checks.number("weight", self.weight)


def read_terms(source: str | pathlib.Path) -> tuple[Term, ...]:
    """The terms of a JSON list, given as text that begins with [ or as the path of a file.

        [{"kind": "length", "weight": 0.2, "maximum": 50}, {"kind": "function", "function":
        "my.py:score"}]

    `weight` is 1 and `name` the kind unless given. Paths inside are relative to where the command
    runs. UserError naming the term, counted from 1, and the field.
    """
    inline = str(source).lstrip().startswith("[")
    where = "The reward terms" if inline else f"The file of reward terms {source}"
    values = parse(str(source) if inline else read(pathlib.Path(source).expanduser()), where)
    require(
        isinstance(values, list) and bool(values),
        f"{where} must be a JSON list of at least one object.",
    )
    terms = tuple(
        to_term(value, f"Reward term {number}") for number, value in enumerate(values, start=1)
    )
    check_names(terms)
    return terms


def read(path: pathlib.Path) -> str:
    """The text of a file of terms; UserError naming it if it cannot be read or is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"The file of reward terms {path} cannot be read: {error.strerror or error}."
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"The file of reward terms {path} is not UTF-8 text (byte {error.start})."
        ) from error


def parse(text: str, where: str) -> Any:
    """The JSON value of a text; UserError, opened by `where`, if it is none."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where}: not valid JSON, line {error.lineno}, column {error.colno}: {error.msg}."
        ) from error
    except (
        ValueError,
        RecursionError,
    ) as error:  # an integer of thousands of digits, brackets without end
        raise UserError(f"{where}: not valid JSON ({error}).") from error


def to_term(value: Any, where: str) -> Term:
    """One object as a term; `where` opens the message of any error."""
    require(
        isinstance(value, dict),
        f"{where} is {value!r}; it must be an object with a kind, one of {', '.join(KINDS)}.",
    )
    require("kind" in value, f"{where} has no kind; it must be one of {', '.join(KINDS)}.")
    kind = value["kind"]
    one_of(f"{where}: kind", kind, KINDS)
    where = f"{where} ({kind})"
    fields = [field for field in dataclasses.fields(KINDS[kind]) if field.init]
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
        return Term(value.get("name", kind), value.get("weight", 1.0), KINDS[kind](**settings))
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def check_names(terms: Sequence[Term]) -> None:
    """UserError naming the terms that have one name."""
    names = [term.name for term in terms]
    twice = sorted({name for name in names if names.count(name) > 1})
    require(
        not twice,
        f"Two reward terms are called {', '.join(twice)}; give each a name of its own by the "
        "field name.",
    )


class Composite:
    """The terms side by side, and their weighted sum.

    As a context manager it starts what the terms need (processes, keys), so that their errors come
    before training, and ends it.
    """

    def __init__(self, terms: Sequence[Term]) -> None:
        require(len(terms) > 0, "There are no reward terms; give at least one.")
        check_names(terms)
        self.terms = tuple(terms)
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Composite:
        with contextlib.ExitStack() as stack:  # ends those that started if a later one cannot
            for term in self.terms:
                if isinstance(term.reward, contextlib.AbstractContextManager):
                    stack.enter_context(term.reward)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], rows: Sequence[Row]
    ) -> dict[str, np.ndarray]:
        """One float64 column [n] a term, without its weight; an empty batch asks no term."""
        checks.sequences(prompts, responses, rows)
        if not len(responses):
            return {term.name: np.zeros(0, np.float64) for term in self.terms}
        return {
            term.name: checked_column(term, term.reward(prompts, responses, rows), len(responses))
            for term in self.terms
        }

    def check_rows(self, rows: Iterable[Row]) -> None:
        """UserError naming the term and the row if one lacks what a term compares with: told before
        training.
        """
        for term in self.terms:
            if isinstance(term.reward, ExactMatch):
                try:
                    term.reward.check_rows(rows)
                except UserError as error:
                    raise UserError(f"The reward term {term.name}: {error}") from error

    def total(self, columns: Mapping[str, np.ndarray]) -> np.ndarray:
        """sum over terms of weight * column: float64 [n]."""
        names = [term.name for term in self.terms]
        if sorted(columns) != sorted(names):
            raise ValueError(
                f"the columns are {', '.join(columns)}; they must be those of the terms "
                f"{', '.join(names)}"
            )
        n = len(columns[names[0]])
        return sum(term.weight * checked_column(term, columns[term.name], n) for term in self.terms)


def checked_column(term: Term, values: np.ndarray, n: int) -> np.ndarray:
    """The column as float64; UserError unless it is n finite numbers."""
    column = np.asarray(values, np.float64)
    shape = f"gave an array of shape {column.shape}; it must be ({n},), one number a response"
    require(column.shape == (n,), f"The reward term {term.name} {shape}.")
    for index in np.flatnonzero(~np.isfinite(column))[:1]:
        raise UserError(
            f"The reward term {term.name} gave {column[index]} at index {index}; every reward "
            "must be finite."
        )
    return column
