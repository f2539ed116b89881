"""Runs tests on request, each time in a fork of a process that has already imported JAX and the
other libraries.

Importing them takes several times as long as most selections of tests. Nothing of the project but
`tests.conftest`, which sets the environment, is imported before the fork: each run imports the
package anew, with the error that is in it then. A request is a line of JSON on standard input,
{"arguments": pytest's, "output": a file, "limit": seconds}; the answer is a line with pytest's exit
status, or `null` after the limit.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
import traceback

import pytest

# Plugins of pytest that these modules import are not rewritten, which does not matter.
QUIET = ("-W", "ignore::pytest.PytestAssertRewriteWarning")
# Slow to import, and part of no mutant.
MODULES = (
    "numpy",
    "flax.nnx",
    "optax",
    "orbax.checkpoint",
    "chex",
    "grain",
    "tensorflow_datasets",
    "transformers",
    "safetensors.numpy",
    "qwix",
    "tyro",
    "rich.progress",
)


def main() -> None:
    import tests.conftest  # noqa: F401  sets what JAX reads when it is imported

    for name in MODULES:
        importlib.import_module(name)
    answers = os.dup(sys.stdout.fileno())
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            _run(request["arguments"], request["output"])
        os.write(answers, f"{json.dumps(_status(child, request['limit']))}\n".encode())


def _run(arguments: list[str], output: str) -> None:
    """pytest in the forked process, in a session of its own; never returns."""
    os.setsid()
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(file, 1)
    os.dup2(file, 2)
    status = 3
    try:
        status = int(pytest.main([*QUIET, *arguments]))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _status(child: int, limit: float) -> int | None:
    """The exit status of a run, below 0 where it died of a signal; None where it had to be
    ended.
    """
    end = time.monotonic() + limit
    try:
        while time.monotonic() < end:
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                child = 0
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.02)
        return None
    finally:
        if child:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)


if __name__ == "__main__":
    main()
