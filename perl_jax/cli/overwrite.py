"""`--overwrite`: says what is to be deleted, and asks; what no command has written stays."""

from __future__ import annotations

import contextlib
import functools
import json
import sys
from collections.abc import Iterator, Sequence

from perl_jax.errors import UserError, require
from perl_jax.hub import artefacts
from perl_jax.hub.export import is_export
from perl_jax.runs import folder as run_folder
from perl_jax.runs.checkpoints import saved_steps
from perl_jax.runtime import files, hosts
from perl_jax.runtime.quantities import size_of
from perl_jax.runtime.replacing import replacing

FLAG, AGREED, ASK = "--overwrite", "yes", "ask"
# The fields that every row of best-of has.
_BEST_OF = {"row", "prompt", "response", "reward"}
# The most bytes of a file that is looked into.
_LARGEST = 2**30


def take(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """Returns (how to overwrite, the other arguments) of a command line.

    `--overwrite` is "ask" and `--overwrite yes` is "yes"; without the flag it is None.
    """
    mode, rest = None, []
    for index, word in enumerate(arguments):
        if word in (FLAG, f"{FLAG}={AGREED}"):
            following = arguments[index + 1 : index + 2]
            mode = AGREED if word != FLAG or following == [AGREED] else ASK
        elif not (word == AGREED and index and arguments[index - 1] == FLAG):
            rest.append(word)
    return mode, rest


@contextlib.contextmanager
def overwriting(name: str, mode: str | None) -> Iterator[None]:
    """Context manager in which the command replaces what it would refuse to touch.

    Args:
        name: The command.
        mode: "ask" on the terminal, "yes", or None: nothing is replaced.
    """
    if mode is None:
        yield
        return
    with replacing(functools.partial(consent, name, mode)):
        yield


def consent(name: str, mode: str, path: files.PathLike) -> None:
    """Returns if what is at a path may be deleted; says what it is, and asks if it must.

    Args:
        name: The command.
        mode: "ask" on the terminal, or "yes".
        path: The run's folder, the artefact, the export or the file.

    Raises:
        UserError: No command has written what is there, the answer is no, or there is no terminal
            to ask on.
    """
    found = files.path_of(path)
    what = described(found)
    require(
        what is not None,
        f"{found} is no run, no artefact, no export and no rows of best-of, and --overwrite "
        "deletes nothing else; delete it yourself, or give another path.",
    )
    if mode == AGREED:
        if hosts.is_writer():
            print(f"perl-jax {name}: {found} is replaced: {what}.", file=sys.stderr, flush=True)
        return
    asked = sys.stdin.isatty() and sys.stderr.isatty() and not hosts.is_distributed()
    require(
        asked,
        f"{found} holds {what}; there is no terminal to ask on whether to delete it: give "
        f"{FLAG} {AGREED} to delete it without a question.",
    )
    print(f"{found} holds {what}. Delete it? [y/N] ", end="", file=sys.stderr, flush=True)
    require(
        sys.stdin.readline().strip().lower() in ("y", "yes"), f"{found} stays; nothing was changed."
    )


def described(path: files.Path) -> str | None:
    """Returns what a command has written at a path, with its size; None: it is something else."""
    if files.is_file(path):
        rows = _rows_of_best_of(path)
        return None if rows is None else f"{rows} rows of best-of, {size_of(files.size(path))}"
    if not files.is_folder(path):
        return None
    with contextlib.suppress(UserError):
        return _described_run(path)
    content = {entry.name for entry in files.listing(path)}
    size = size_of(files.folder_bytes(path))
    if content <= {artefacts.RECORD, *artefacts.TREES}:
        with contextlib.suppress(UserError):
            record = artefacts.read_record(path)
            return f"a {record.role} artefact of step {record.step}, {size}"
    return f"an export, {size}" if is_export(path) else None


def _described_run(path: files.Path) -> str:
    """Returns what a run's folder holds; raises UserError if it is none."""
    settings = run_folder.read_settings(path)["config"]
    made = run_folder.contents(path)
    size = sum(files.folder_bytes(p) if files.is_folder(p) else files.size(p) for p in made)
    done = max(saved_steps(path / "checkpoints"), default=0)
    names = ", ".join(entry.name for entry in made)
    return (
        f"a run of {settings.get('job')}, {done} of {settings.get('steps')} steps, {size_of(size)} "
        f"({names})"
    )


def _rows_of_best_of(path: files.Path) -> int | None:
    """Returns the number of rows of a file that best-of has written; None for any other file."""
    if files.size(path) > _LARGEST:
        return None
    try:
        lines = [line for line in files.read_text(path).splitlines() if line.strip()]
        first = json.loads(lines[0])
    except (UserError, ValueError, IndexError, RecursionError):
        return None
    return len(lines) if isinstance(first, dict) and set(first) >= _BEST_OF else None
