"""The worker process of a reward function: loads the function, calls it and checks what it returns.

The process is separate from training, so this module imports nothing heavy (a test checks). What
the function prints goes to standard error, because standard output belongs to the command; replies
travel through a pipe of their own.
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

SHOWN = 80  # characters of a response that a message quotes
LONGEST = 300  # characters of an exception's message that a message quotes


def main() -> None:
    """Runs the worker until the other end of the pipe is closed; `function.Worker` starts this
    program.

    The program has two arguments: the function (`module:function` or `path/to/file.py:function`),
    and the file descriptor of the worker's end of the pipe.

    The worker first sends ("ready", whether the function takes rows), or ("error", message) and
    ends. Then it answers each (prompts, responses, rows) with ("values", floats) or ("error",
    message).
    """
    target, number = sys.argv[1], int(sys.argv[2])
    os.set_inheritable(number, False)  # the function's child processes would keep the pipe open
    threading.Thread(target=end_with_parent, args=(os.dup(0),), daemon=True).start()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    sys.stdout = sys.stderr  # line buffered: prints appear at once
    with contextlib.suppress(EOFError, OSError):  # the other end is closed
        answer(target, Connection(number))


def end_with_parent(watched: int) -> None:
    """Waits until the parent process ends, even by SIGKILL; then kills this process and its
    children.

    Args:
        watched: The file descriptor of a copy of the standard input, whose other end the parent
            holds open.
    """
    os.read(watched, 1)
    os.killpg(0, signal.SIGKILL)


def answer(target: str, connection: Connection) -> None:
    """Loads the function, then answers batches until the pipe is closed, which raises EOFError or
    OSError.

    Returns early if the function cannot be loaded. `main` describes the messages.

    Args:
        target: The function, `module:function` or `path/to/file.py:function`.
        connection: The worker's end of the pipe.
    """
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
    """Returns the function named by `module:function` or `path/to/file.py:function`.

    Raises UserError if the import fails or there is no such function.
    """
    source, _, name = target.rpartition(":")
    try:
        module = load_file(source) if source.endswith(".py") else load_module(source)
    except BaseException as error:  # also SystemExit: an imported script may call sys.exit
        traceback.print_exc()
        where = location(error.__traceback__, source)
        raise UserError(
            f"The reward function {target} cannot be imported: {described(error)}{where}."
        ) from error
    own = [
        key
        for key, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__
    ]
    require(
        hasattr(module, name),
        f"{source} has no function {name!r}; it has {', '.join(own) or 'none'}.",
    )
    function = getattr(module, name)
    require(
        callable(function),
        f"The reward function {target} is a {type(function).__name__}; it must be a function.",
    )
    return function


def load_file(source: str) -> ModuleType:
    """Imports a Python file and returns its module.

    Puts the file's folder at the front of `sys.path`, so that modules beside the file can be
    imported, as in a script.

    Args:
        source: The path of the file.
    """
    path = pathlib.Path(source).expanduser().resolve()
    sys.path.insert(0, str(path.parent))
    # Not the file's own name, which may be that of a standard module (json.py, random.py).
    spec = importlib.util.spec_from_file_location("_reward_function_file", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"Python cannot import {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def load_module(source: str) -> ModuleType:
    """Imports a module by its dotted name and returns it.

    Puts the working directory at the front of `sys.path`, so that modules in it are found.

    Args:
        source: The module's name.
    """
    sys.path.insert(0, os.getcwd())  # unlike `python -m`, an installed command leaves it out
    return importlib.import_module(source)


def wants_rows(target: str, function: Callable) -> bool:
    """Returns True if a function takes (prompts, responses, rows), False if it takes (prompts,
    responses).

    A third parameter with a default counts only if it is called `rows`.

    Args:
        target: The function's name, for error messages.
        function: The function.

    Raises:
        UserError: The function takes neither, or its parameters cannot be read.
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
    """Calls the function and returns its result, with arrays and other iterables as lists
    (`listed`).

    Prints the traceback if the function raises.

    Args:
        target: The function's name, for error messages.
        function: The function.
        arguments: Its positional arguments.

    Raises:
        UserError: The function raises anything, SystemExit too.
    """
    try:
        # Listed here, because a generator runs the function's code.
        return listed(function(*arguments))
    except BaseException as error:  # also SystemExit, which would end the worker silently
        traceback.print_exc()
        where = location(error.__traceback__, target.rpartition(":")[0])
        raise UserError(
            f"The reward function {target} raised {described(error)}{where}."
        ) from error


def listed(result: Any) -> Any:
    """Returns an array, a generator or any other iterable as a list.

    Strings, bytes, mappings, sets, and values that are not iterable are returned unchanged.
    """
    kept = isinstance(result, (str, bytes, Mapping, Set)) or not isinstance(result, Iterable)
    return result if kept else list(result)


def checked_values(target: str, result: Any, responses: Sequence[str]) -> list[float]:
    """Returns a reward function's result as one finite float per response; True is 1 and False is
    0.

    Args:
        target: The function's name, for error messages.
        result: What the function returned, after `listed`.
        responses: The responses that were scored.

    Raises:
        UserError: The result is not a list of one finite number per response.
    """
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
    """Returns one value of a reward function's result as a float.

    Args:
        target: The function's name, for error messages.
        value: The value.
        index: The response's index in the batch, for error messages.
        response: The response, for error messages.

    Raises:
        UserError: The value is not a finite number.
    """
    where = f"at index {index}, for the response {response[:SHOWN]!r}"
    number = to_float(value)
    kind = type(value).__name__
    if number is None:
        raise UserError(
            f"The reward function {target} returned a {kind} {where}; it must be a number."
        )
    require(
        math.isfinite(number),
        f"The reward function {target} returned {number} {where}; it must be a finite number.",
    )
    return number


def to_float(value: Any) -> float | None:
    """Returns a value as a float, or None if it is not a number.

    Numbers of Python, NumPy and JAX count, and so do arrays and tensors without axes. An integer
    that is too large for a float gives infinity.
    """
    if isinstance(value, (str, bytes)) or getattr(value, "ndim", 0) != 0:
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf
    except (TypeError, ValueError):
        return None


def described(error: BaseException) -> str:
    """Returns an exception's type and its message on one line, cut to `LONGEST` characters, without
    a full stop at its end.
    """
    message = " ".join(str(error).split())[:LONGEST]
    return f"{type(error).__name__}: {message}".rstrip(": .")


def location(trace: TracebackType | None, source: str) -> str:
    """Returns ` (FILE, line N, in NAME)`, the place where the user's code raised an exception.

    The place is the deepest frame in the user's module, or the deepest frame of all if there is
    none. Frames of this file and of Python's import system do not count. Returns "" without any
    frame.

    Args:
        trace: The exception's traceback.
        source: The user's module: its dotted name, or the path of a .py file.
    """
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
