"""The worker process of a reward function: loads the function, calls it and checks what it returns.

The process is separate from training, so this module imports nothing heavy (a test checks). What
the function prints goes to standard error, because standard output belongs to the command; replies
travel through a pipe of their own. `supervisor` starts the process.
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


LOST_PIPE = 117  # the exit code of a worker whose function has closed the pipe


def main(target: str, number: int, watched: int) -> None:
    """Runs the worker until the other end of the pipe is closed.

    The worker first sends (0, "ready", whether the function takes rows), or (0, "error", message)
    and ends. Then it answers each (n, prompts, responses, rows) with (n, "values", floats) or
    (n, "error", message). The numbers n say which batch a reply belongs to.

    Args:
        target: The function, `module:function` or `path/to/file.py:function`.
        number: The file descriptor of the worker's end of the pipe.
        watched: The file descriptor of a pipe whose other end the supervisor holds open.
    """
    os.set_inheritable(number, False)  # programs that the function starts would keep the pipe open
    threading.Thread(target=end_with_supervisor, args=(watched,), daemon=True).start()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    sys.stdout = sys.stderr  # line buffered: prints appear at once
    connection = Connection(number)
    # A process that the function forks must neither read batches nor answer them.
    os.register_at_fork(after_in_child=connection.close)
    with contextlib.suppress(EOFError, OSError):  # the other end is closed
        answer(target, connection)


def end_with_supervisor(watched: int) -> None:
    """Waits until the supervisor ends, even by SIGKILL; then kills this process and its group.

    Args:
        watched: The file descriptor of a pipe whose other end the supervisor holds open.
    """
    try:
        os.read(watched, 1)
    except OSError:
        return  # the function has closed it
    os.killpg(0, signal.SIGKILL)


def answer(target: str, connection: Connection) -> None:
    """Loads the function, then answers batches until the pipe is closed, which raises EOFError or
    OSError.

    Returns early if the function cannot be loaded. `main` describes the messages.

    Args:
        target: The function, `module:function` or `path/to/file.py:function`.
        connection: The worker's end of the pipe.
    """
    own, pipe = os.getpid(), identity(connection)
    try:
        function = load(target)
        takes_rows = wants_rows(target, function)
        reply = ("ready", takes_rows)
    except UserError as error:
        reply = ("error", str(error))
    end_if_forked(own)
    send(connection, pipe, (0, *reply))
    if reply[0] == "error":
        return
    while True:
        number, prompts, responses, rows = connection.recv()
        arguments = (prompts, list(responses), rows) if takes_rows else (prompts, list(responses))
        try:
            result = call(target, function, arguments, own)
            answered = ("values", checked_values(target, result, responses))
        except UserError as error:
            answered = ("error", str(error))
        except BaseException as error:  # of a value that is asked for its float
            answered = ("error", f"The values of {target} cannot be read: {described(error)}.")
        with contextlib.suppress(Exception):
            sys.stderr.flush()
        send(connection, pipe, (number, *answered))


def end_if_forked(own: int) -> None:
    """Ends this process if it is a copy of the worker that the function has forked.

    Args:
        own: The number of the worker's process.
    """
    if os.getpid() != own:
        with contextlib.suppress(Exception):
            sys.stderr.flush()
        os._exit(0)


def identity(connection: Connection) -> tuple[int, int] | None:
    """Returns numbers that identify the file behind a connection; None if it is closed."""
    try:
        found = os.fstat(connection.fileno())
    except OSError:
        return None
    return found.st_dev, found.st_ino


def send(connection: Connection, pipe: tuple[int, int] | None, message: tuple) -> None:
    """Sends a message through the pipe.

    Ends the process with `LOST_PIPE` if the function has closed the pipe: its file descriptor may
    belong to a file of the function by now.

    Args:
        connection: The worker's end of the pipe.
        pipe: The `identity` of the pipe.
        message: The message.
    """
    if pipe is None or identity(connection) != pipe:
        os._exit(LOST_PIPE)
    connection.send(message)


def load(target: str) -> Callable:
    """Returns the function named by `module:function` or `path/to/file.py:function`.

    Raises UserError if the import fails or there is no such function.
    """
    source, _, name = target.rpartition(":")
    try:
        module = load_file(source) if source.endswith(".py") else load_module(source)
    except BaseException as error:  # also SystemExit: an imported script may call sys.exit
        print_traceback()
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


def call(target: str, function: Callable, arguments: tuple, own: int) -> Any:
    """Calls the function and returns its result, with arrays and other iterables as lists
    (`listed`).

    Prints the traceback if the function raises. Ends the process if it is not the worker: the
    function may fork, and return or raise in both processes.

    Args:
        target: The function's name, for error messages.
        function: The function.
        arguments: Its positional arguments.
        own: The number of the worker's process.

    Raises:
        UserError: The function raises anything, SystemExit too.
    """
    try:
        # Listed here, because a generator runs the function's code.
        result = listed(function(*arguments))
    except BaseException as error:  # also SystemExit, which would end the worker silently
        end_if_forked(own)
        print_traceback()
        where = location(error.__traceback__, target.rpartition(":")[0])
        raise UserError(
            f"The reward function {target} raised {described(error)}{where}."
        ) from error
    end_if_forked(own)
    return result


def print_traceback() -> None:
    """Prints the traceback of the exception that is handled, unless standard error is closed."""
    with contextlib.suppress(Exception):
        traceback.print_exc()


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
    try:
        message = " ".join(str(error).split())[:LONGEST]
    except Exception:  # of the user's own class
        message = ""
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
