"""The worker process of a reward function: loads it, calls it, checks what it returns.

Runs apart from training, so nothing heavy is imported here (a test looks). What the function prints
goes to standard error: replies travel through a pipe of their own, and standard output is the
command's.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import math
import os
import pathlib
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from multiprocessing.connection import Connection
from types import ModuleType, TracebackType
from typing import Any

from perl_jax.errors import UserError, require

SHOWN = 80  # characters of a response in a message
LONGEST = 300  # characters of an exception's message in ours


def main() -> None:
    """The program that `function.Worker` starts: the function's name and the number of its end of
    the pipe are arguments.

    Answers batches until the other end closes: sends ("ready", whether it wants rows) once, then
    for each (prompts, responses, rows) one of ("values", floats) and ("error", sentence). An error
    before "ready" is the last message.
    """
    target, number = sys.argv[1], int(sys.argv[2])
    os.set_inheritable(number, False)  # programs that the function starts would hold the pipe open
    threading.Thread(target=end_with_parent, args=(os.dup(0),), daemon=True).start()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    sys.stdout = sys.stderr  # at once, line by line, and not when a buffer is full
    with contextlib.suppress(EOFError, OSError):  # the other end is closed: nobody is left to tell
        answer(target, Connection(number))


def end_with_parent(watched: int) -> None:
    """Ends this process and what it started when the input that it began with ends: with its
    parent, even by a kill.
    """
    os.read(watched, 1)
    os.killpg(0, signal.SIGKILL)


def answer(target: str, connection: Connection) -> None:
    try:
        function = load(target)
        takes_rows = wants_rows(target, function)
    except UserError as error:
        connection.send(("error", str(error)))
        return
    connection.send(("ready", takes_rows))
    while True:
        prompts, responses, rows = connection.recv()
        try:
            arguments = (prompts, responses, rows) if takes_rows else (prompts, responses)
            reply = ("values", checked_values(target, call(target, function, arguments), responses))
        except UserError as error:
            reply = ("error", str(error))
        sys.stderr.flush()
        connection.send(reply)


def load(target: str) -> Callable:
    """The function of `module:function` or `path/to/file.py:function`; UserError if there is
    none.
    """
    source, _, name = target.rpartition(":")
    try:
        module = load_file(source) if source.endswith(".py") else load_module(source)
    except BaseException as error:  # a script may well exit when it is imported
        traceback.print_exc()
        where = location(error.__traceback__, source)
        raise UserError(
            f"The reward function {target} cannot be imported: {described(error)}{where}."
        ) from error
    function = getattr(module, name, None)
    own = [
        key
        for key, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__
    ]
    require(
        hasattr(module, name),
        f"{source} has no function {name!r}; it has {', '.join(own) or 'none'}.",
    )
    require(
        callable(function),
        f"The reward function {target} is a {type(function).__name__}; it must be a function.",
    )
    return function


def load_file(source: str) -> ModuleType:
    path = pathlib.Path(source).expanduser().resolve()
    sys.path.insert(0, str(path.parent))  # the file's neighbours can be imported, as in a script
    # Not the file's own name, which may be that of a module others need (json.py, random.py).
    spec = importlib.util.spec_from_file_location("_reward_function_file", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def load_module(source: str) -> ModuleType:
    sys.path.insert(0, os.getcwd())  # an installed command, unlike `python -m`, does not look there
    return importlib.import_module(source)


def wants_rows(target: str, function: Callable) -> bool:
    """Whether it takes (prompts, responses, rows), not (prompts, responses); UserError if neither.

    A third parameter with a default is taken for rows only if that is its name.
    """
    try:
        signature = inspect.signature(function)
    except ValueError as error:
        raise UserError(
            f"The parameters of the reward function {target} cannot be read; wrap it in a def."
        ) from error
    places = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    third = [parameter for parameter in signature.parameters.values() if parameter.kind in places][
        2:3
    ]
    rows = bool(third) and (third[0].default is inspect.Parameter.empty or third[0].name == "rows")
    try:
        signature.bind(*range(3 if rows else 2))
    except TypeError as error:
        wanted = "it must take (prompts, responses) or (prompts, responses, rows)"
        raise UserError(f"The reward function {target} takes {signature}; {wanted}.") from error
    return rows


def call(target: str, function: Callable, arguments: tuple) -> Any:
    """What the function returns, as a list if it can be gone through."""
    try:
        result = function(*arguments)
        kept = isinstance(result, (str, bytes, Mapping, Set)) or not isinstance(result, Iterable)
        return (
            result if kept else list(result)
        )  # here, because a generator runs the function's code
    except BaseException as error:  # sys.exit too: it would end the worker without a word
        traceback.print_exc()
        where = location(error.__traceback__, target.rpartition(":")[0])
        raise UserError(
            f"The reward function {target} raised {described(error)}{where}."
        ) from error


def checked_values(target: str, result: Any, responses: Sequence[str]) -> list[float]:
    """One finite float a response; True is 1 and False is 0."""
    n = len(responses)
    wanted = f"it must return a sequence of {n} numbers, one a response"
    require(
        isinstance(result, list),
        f"The reward function {target} returned a {type(result).__name__}; {wanted}.",
    )
    require(
        len(result) == n, f"The reward function {target} returned {len(result)} values; {wanted}."
    )
    return [
        checked_value(target, value, index, responses[index]) for index, value in enumerate(result)
    ]


def checked_value(target: str, value: Any, index: int, response: str) -> float:
    where = f"at index {index}, for the response {response[:SHOWN]!r}"
    number = to_float(value)
    kind = type(value).__name__
    require(
        number is not None,
        f"The reward function {target} returned a {kind} {where}; it must be a number.",
    )
    require(
        math.isfinite(number),
        f"The reward function {target} returned {number} {where}; it must be a finite number.",
    )
    return number


def to_float(value: Any) -> float | None:
    """The number a value is (also NumPy's, JAX's, or a tensor without axes), None if it is none."""
    if isinstance(value, (str, bytes)) or getattr(value, "ndim", 0) != 0:
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf
    except (TypeError, ValueError):
        return None


def described(error: BaseException) -> str:
    """Type and message on one line, as the last line of a traceback, without the full stop at the
    end.
    """
    message = " ".join(str(error).split())[:LONGEST]
    return f"{type(error).__name__}: {message}".rstrip(": .")


def location(trace: TracebackType | None, source: str) -> str:
    """` (file, line n, in name)`: the deepest frame in the user's module, else the deepest."""
    # Without those of this file, and of Python's import.
    frames = [
        f
        for f in traceback.extract_tb(trace)
        if f.filename != __file__ and not f.filename.startswith("<frozen")
    ]
    if not frames:
        return ""
    stem = pathlib.Path(source).stem if source.endswith(".py") else source.rpartition(".")[2]
    own = [frame for frame in frames if pathlib.Path(frame.filename).stem == stem]
    frame = (own or frames)[-1]
    return f" ({frame.filename}, line {frame.lineno}, in {frame.name})"
