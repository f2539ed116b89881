"""Renders Jinja templates in a sandbox that counts steps, so that an endless template is an error
rather than a hang.

The result equals that of transformers' `apply_chat_template`, with a given date instead of today's.
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any, ClassVar

import jinja2
from jinja2 import ext, nodes, sandbox
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.utils import Namespace

# The most steps of one rendering (loop iterations, calls, items read by filters). A chat template
# takes a few hundred.
STEPS = 100_000
# The most characters of any text in a rendering.
_LONGEST = 10_000_000
_COUNTED, _BOUNDED = "_counted", "_bounded"


class Endless(Exception):
    """A rendering took more steps, or made a longer text, than any chat template needs."""


class Template:
    """A parsed chat template.

    Args:
        source: The template's text.
        date: The date that the template's `strftime_now` formats.

    Raises jinja2.TemplateError, or an error of the template's own operations, if it cannot be
    parsed.
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
        """Returns the rendered text.

        Args:
            variables: The template's variables, such as `messages` and `add_generation_prompt`.

        Raises:
            Endless: The rendering takes more than `STEPS` steps, or makes a text that is too long.
            jinja2.TemplateError: The template refuses the variables. Its operations can raise other
                errors.
        """
        self._environment.steps = 0
        return self._template.render(**variables)


class _Environment(sandbox.ImmutableSandboxedEnvironment):
    """The functions and filters that chat templates may use; each use is counted."""

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
        """Adds to the count of steps of this rendering; raises Endless above `STEPS`."""
        self.steps += steps
        if self.steps > STEPS:
            raise Endless

    def call(
        self, context: Context, function: Any, /, *arguments: Any, **named: Any
    ) -> Any:  # `self` may be one of the names
        """Calls a function, method or macro for the template and returns its result.

        Counts steps: one, those of reading the object that a method belongs to, and those of
        reading the result. Raises Endless above the limit.
        """
        self.take(1 + _size(getattr(function, "__self__", None)))
        found = super().call(context, function, *arguments, **named)
        self.take(_size(found))
        return found

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Returns the result of `+`, `*` or `**` in a template.

        Raises Endless, before computing, if the result would be too long: a text or list of more
        than `_LONGEST` elements, or an integer of more bits.

        Args:
            context: Jinja's context.
            operator: `+`, `*` or `**`.
            left: The left operand.
            right: The right operand.
        """
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
    """The `{% generation %}` tag, with which trainers mark assistant text; only its content is
    rendered.
    """

    tags: ClassVar[set[str]] = {"generation"}  # read by jinja2

    def parse(self, parser: Parser) -> nodes.Node:
        """Returns what lies between `{% generation %}` and `{% endgeneration %}`, as a scope of its
        own.
        """
        line = next(parser.stream).lineno
        return nodes.Scope(
            parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line
        )


class _Namespace(Namespace):
    """Jinja's namespace, without attribute names that could reach Python internals."""

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
    """Returns dict(*arguments, **values); a Python function, because Jinja counts only calls of
    those.
    """
    return dict(*arguments, **values)


def _check_name(name: Any) -> None:
    """Raises SecurityError for an attribute name that begins with an underscore."""
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace has no attribute {name!r}")


def _raise(message: Any) -> None:
    """Raises jinja2.TemplateError with the template's own message."""
    raise jinja2.TemplateError(str(message))


def _as_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """Returns a value as JSON text; the arguments are those of `json.dumps`.

    Replaces Jinja's own filter, which would escape HTML characters.
    """
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _filtered(node: nodes.Node, name: str) -> nodes.Filter:
    """Returns a node of the syntax tree that applies a filter to another node.

    Args:
        node: The expression to filter.
        name: The filter's name.
    """
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _counting(environment: _Environment, function: Callable) -> Callable:
    """Returns a filter that counts steps for reading its arguments before it runs.

    Args:
        environment: Holds the count; its `take` raises Endless above the limit.
        function: The filter.
    """

    @functools.wraps(function)
    def counted(*arguments: Any, **named: Any) -> Any:
        environment.take(1 + sum(map(_size, arguments)))
        return function(*arguments, **named)

    return counted


@jinja2.pass_environment
def _counted(environment: _Environment, items: Iterable) -> Iterator:
    """Yields the items of a loop and counts one step for each; raises Endless above the limit."""
    for item in items:
        environment.take(1)
        yield item


@jinja2.pass_context
def _bounded(context: Context, value: Any) -> Any:
    """Returns a part of a concatenation unchanged; raises Endless if twice its length is over the
    limit.
    """
    if isinstance(value, str):
        # Twice the length, because the template may concatenate the text with itself.
        _check_length(2 * len(value))
    return value


def _check_length(length: int) -> None:
    """Raises Endless if `length`, a number of characters, elements or bits, is above `_LONGEST`."""
    if length > _LONGEST:
        raise Endless


def _size(value: Any) -> int:
    """Returns the number of steps that reading a value counts as.

    One for every 100 characters of a text, one for each element of a list, tuple, dict or range,
    and 0 for any other value.
    """
    if isinstance(value, str):
        return len(value) // 100
    return len(value) if isinstance(value, (list, tuple, dict, range)) else 0
