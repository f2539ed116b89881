"""Jinja templates rendered in a sandbox that counts their steps: one that does not end is an error,
not a hang.

A rendering equals that of transformers' `apply_chat_template`, with the caller's date in the place
of today's.
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any

import jinja2
from jinja2 import ext, nodes, sandbox
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.utils import Namespace

# Of one rendering: turns of loops, calls, and items that filters read. A chat template takes a few
# hundred.
STEPS = 100_000
# Characters of any text that a rendering makes.
_LONGEST = 10_000_000
_COUNTED, _BOUNDED = "_counted", "_bounded"


class Endless(Exception):
    """A rendering took more steps, or made a longer text, than any chat template needs."""


class Template:
    """A parsed chat template. jinja2.TemplateError (and whatever a template's own operations raise)
    where it does not parse.

    date: what the template's `strftime_now` formats.
    """

    def __init__(self, source: str, date: datetime.date) -> None:
        self._environment = _Environment(date)
        tree = self._environment.parse(source)
        for loop in list(tree.find_all(nodes.For)):
            loop.iter = _filtered(loop.iter, _COUNTED)
        for joined in list(tree.find_all(nodes.Concat)):
            joined.nodes = [_filtered(part, _BOUNDED) for part in joined.nodes]
        tree.set_environment(self._environment)
        code = self._environment.compile(tree)
        self._template = jinja2.Template.from_code(
            self._environment, code, self._environment.make_globals(None)
        )

    def render(self, **variables: Any) -> str:
        """The template's text. Endless where it goes on for too long."""
        self._environment.steps = 0
        return self._template.render(**variables)


class _Environment(sandbox.ImmutableSandboxedEnvironment):
    """What chat templates may use, each use of it counted."""

    intercepted_binops = frozenset(("+", "*", "**"))

    def __init__(self, date: datetime.date) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, ext.loopcontrols]
        )
        self.steps = 0
        self.filters["tojson"] = _as_json
        self.filters = {name: _counting(self, function) for name, function in self.filters.items()}
        self.filters |= {_COUNTED: _counted, _BOUNDED: _bounded}
        self.globals |= {
            "raise_exception": _raise,
            "strftime_now": date.strftime,
            "namespace": _Namespace,
            "dict": _dictionary,
        }

    def take(self, steps: int) -> None:
        """Counts steps. Endless beyond the limit."""
        self.steps += steps
        if self.steps > STEPS:
            raise Endless

    def call(
        self, context: Context, function: Any, /, *arguments: Any, **named: Any
    ) -> Any:  # `self` may be one of the names
        """Every call of a template: functions, methods and its own macros."""
        self.take(1 + _size(getattr(function, "__self__", None)))
        found = super().call(context, function, *arguments, **named)
        self.take(_size(found))
        return found

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Computes `+`, `*` or `**`; refuses a result that would be too long, before it is made."""
        if operator == "**":
            bits = (
                left.bit_length() * right if isinstance(left, int) and isinstance(right, int) else 0
            )
            _check_length(bits)
        elif operator == "*":
            for text, times in ((left, right), (right, left)):
                if isinstance(text, Sized) and isinstance(times, int):
                    _check_length(len(text) * times)
        elif isinstance(left, Sized) and isinstance(right, Sized):
            _check_length(len(left) + len(right))
        return super().call_binop(context, operator, left, right)


class _Generation(ext.Extension):
    """`{% generation %}`, by which trainers mark what the assistant wrote; here its content
    alone.
    """

    tags = {"generation"}  # noqa: RUF012  jinja2 reads this attribute of the class

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(
            parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line
        )


class _Namespace(Namespace):
    """Jinja's namespace without names that could reach Python's own attributes."""

    def __init__(*arguments: Any, **values: Any) -> None:  # `self` may be one of the names
        self, *rest = arguments
        values = dict(*rest, **values)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _dictionary(*arguments: Any, **values: Any) -> dict:
    return dict(*arguments, **values)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace has no attribute {name!r}")


def _raise(message: Any) -> None:
    raise jinja2.TemplateError(str(message))


def _as_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter would escape for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _filtered(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _counting(environment: _Environment, function: Callable) -> Callable:
    """A filter that counts what it is given."""

    @functools.wraps(function)
    def counted(*arguments: Any, **named: Any) -> Any:
        environment.take(1 + sum(map(_size, arguments)))
        return function(*arguments, **named)

    return counted


@jinja2.pass_context
def _counted(context: Context, items: Iterable) -> Iterator:
    """The items of a loop, a step each."""
    for item in items:
        context.environment.take(1)
        yield item


@jinja2.pass_context
def _bounded(context: Context, value: Any) -> Any:
    """A part of a longer text, as it is."""
    if isinstance(value, str):
        # Twice this much is what doubling a text could make of it.
        _check_length(2 * len(value))
    return value


def _check_length(length: int) -> None:
    if length > _LONGEST:
        raise Endless


def _size(value: Any) -> int:
    """Steps that reading a whole value counts as."""
    if isinstance(value, str):
        return len(value) // 100
    return len(value) if isinstance(value, (list, tuple, dict, range)) else 0
