"""Runs the mutants: each in a copy of the tracked files, against the tests that should notice it.

    python -m tests.mutants [--only NAME ...] [--jobs N] [--page FILE]

First all tests that the mutants name run without any mutant; where one fails its mutants count as
survivors. Then one mutant at a time is put into a copy, and its tests run until the first that
fails. The checkout is never written to, but for the page with the results (docs/mutants.md). The
exit status is 1 when fewer than 95 % of the mutants that have run are noticed.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import json
import os
import pathlib
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence

from tests.mutants.guard import ROOT
from tests.mutants.table import MUTANTS, Mutant

CHECKOUT = pathlib.Path(__file__).resolve().parents[2]
PAGE = CHECKOUT / "docs" / "mutants.md"
WANTED = 0.95
# Seconds; a mutant may make a loop endless.
LIMIT = 600
PASSED, FAILED = 0, 1
# A bar within a cell of a table in Markdown.
BAR = r"\|"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a mutant. killer: the test that failed, or how it ended otherwise; None: it
    survived.
    """

    mutant: Mutant
    killer: str | None
    seconds: float

    @property
    def killed(self) -> bool:
        return self.killer is not None


def copy_tracked(folder: pathlib.Path) -> None:
    """Copies the files that git tracks, as they are in the checkout now."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "perl_jax", "tests", "experiments", "launch", "pyproject.toml"],
        cwd=CHECKOUT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (CHECKOUT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(CHECKOUT / name, folder / name)


def temporary(folder: pathlib.Path) -> pathlib.Path:
    """The folder of temporary files of the tests in a copy."""
    return folder.with_name(f"{folder.name}-temporary")


def environment(folder: pathlib.Path, programs: pathlib.Path) -> dict[str, str]:
    """Of a test process: it imports from the copy, and shares compiled programs with the others."""
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    shared = {
        "PERL_JAX_SHARED": str(CHECKOUT.parent / "shared"),
        "JAX_COMPILATION_CACHE_DIR": str(programs),
    } | os.environ
    return shared | {
        "PYTHONPATH": os.pathsep.join(paths),
        ROOT: str(folder),
        # Processes that clean up one folder of temporary files disturb each other.
        "PYTEST_DEBUG_TEMPROOT": str(temporary(folder)),
        "PYTHONDONTWRITEBYTECODE": "1",
    }


class Copy:
    """A copy of the tracked files, and the process that runs tests in it (`nursery`)."""

    def __init__(self, folder: pathlib.Path, programs: pathlib.Path) -> None:
        copy_tracked(folder)
        temporary(folder).mkdir()
        self.folder, self.output = folder, folder / "output.txt"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.mutants.nursery"],
            cwd=folder,
            env=environment(folder, programs),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(
        self, tests: Sequence[str], *options: str, limit: float = LIMIT
    ) -> tuple[int | None, str]:
        """(pytest's exit status, its output); the status is None after the time limit, and below 0
        where the process died of a signal.
        """
        arguments = [
            "-n",
            "0",
            "-p",
            "no:cacheprovider",
            "-p",
            "tests.mutants.guard",
            "-m",
            "not exhaustive",
            "--tb=line",
            *options,
            *(f"tests/{test}" for test in tests),
        ]
        self.process.stdin.write(
            json.dumps({"arguments": arguments, "output": str(self.output), "limit": limit}) + "\n"
        )
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit("The process that runs the tests has died.")
        return json.loads(answer), self.output.read_text(encoding="utf-8", errors="replace")

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def reported(output: str, words: str) -> list[str]:
    """The tests that the summary lists under one of the words: `FAILED tests/a.py::test_b -
    why`.
    """
    return re.findall(rf"^(?:{words}) tests/(.+?)(?: - .*)?$", output, re.MULTILINE)


def of_selection(test: str, selection: str) -> bool:
    """Whether a test is among those that a mutant names by a file, a function or a test."""
    return test == selection or test.startswith((f"{selection}::", f"{selection}["))


def unfit(copy: Copy, mutants: Iterable[Mutant]) -> tuple[set[str], str]:
    """The selections of which a test fails without any mutant, and pytest's output."""
    selections = sorted({test for mutant in mutants for test in mutant.tests})
    status, output = copy.run(selections, "-rfE", limit=100 * LIMIT)
    if status not in (PASSED, FAILED):
        raise SystemExit(f"The tests do not run without a mutant:\n{output[-4000:]}")
    bad = reported(output, "FAILED|ERROR")
    return {
        selection for selection in selections if any(of_selection(test, selection) for test in bad)
    }, output


def outcome(mutant: Mutant, copy: Copy) -> Outcome:
    """Plants a mutant in a copy, runs its tests, and takes it out again."""
    path = copy.folder / mutant.path
    original = path.read_text(encoding="utf-8")
    begin = time.perf_counter()
    path.write_text(mutant.planted(original), encoding="utf-8")
    try:
        status, output = copy.run(mutant.tests, "-x", "-rfE")
    finally:
        path.write_text(original, encoding="utf-8")
    seconds = time.perf_counter() - begin
    if status is None or status < 0:
        return Outcome(mutant, "the time limit" if status is None else "a crash", seconds)
    if status not in (PASSED, FAILED):
        # An error that cannot be imported shows nothing of the tests.
        print(
            f"{mutant.name}: the tests did not run (pytest's status {status}); it counts as a "
            f"survivor:\n{output[-4000:]}",
            flush=True,
        )
        return Outcome(mutant, None, seconds)
    return Outcome(
        mutant, None if status == PASSED else reported(output, "FAILED|ERROR")[0], seconds
    )


def run_all(mutants: Sequence[Mutant], jobs: int) -> list[Outcome]:
    """Every mutant's outcome, in the table's order; said as they come."""
    with (
        tempfile.TemporaryDirectory(prefix="perl_jax_mutants_") as temporary,
        contextlib.ExitStack() as stack,
    ):
        root = pathlib.Path(temporary).resolve()
        programs = pathlib.Path(os.environ.get("JAX_COMPILATION_CACHE_DIR", root / "programs"))
        copies: queue.Queue[Copy] = queue.Queue()
        for number in range(jobs):
            copies.put(stack.enter_context(contextlib.closing(Copy(root / str(number), programs))))
        begin = time.perf_counter()
        bad, output = unfit(copies.queue[0], mutants)
        print(
            f"{len({test for mutant in mutants for test in mutant.tests})} selections of tests "
            f"without a mutant: {time.perf_counter() - begin:.0f} s",
            flush=True,
        )
        if bad:
            print(
                f"{output[-4000:]}\nThese fail without a mutant: {', '.join(sorted(bad))}.",
                flush=True,
            )

        def one(mutant: Mutant) -> Outcome:
            if bad.intersection(mutant.tests):
                return Outcome(mutant, None, 0.0)
            copy = copies.get()
            try:
                found = outcome(mutant, copy)
            finally:
                copies.put(copy)
            print(
                f"{'killed  ' if found.killed else 'SURVIVES'} {mutant.name:<34} "
                f"{found.seconds:5.1f} s  {found.killer or ''}",
                flush=True,
            )
            return found

        with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
            return list(pool.map(one, mutants))


def summary(killers: Mapping[str, str | None], mutants: Sequence[Mutant]) -> str:
    """How many were noticed."""
    killed, files = (
        sum(killers.get(mutant.name) is not None for mutant in mutants),
        len({mutant.file for mutant in mutants}),
    )
    return (
        f"{killed} of {len(mutants)} errors in {files} files are noticed "
        f"({killed / len(mutants):.1%})"
    )


def page(killers: Mapping[str, str | None]) -> str:
    """The results as Markdown. killers: of each mutant that has run the test that noticed it, or
    None.
    """
    shown = lambda name: (
        "not run yet"
        if name not in killers
        else "**nothing**"
        if killers[name] is None
        else f"`{killers[name]}`"
    )
    lines = [
        "# Planted errors, and the tests that notice them",
        "",
        "Written by `make mutants`, which puts one error at a time into a copy of the package and "
        "runs the tests that should notice it, until the",
        f"first that fails: {summary(killers, MUTANTS)}. The errors are in "
        "`tests/mutants/table.py`; a quick test keeps them where the code is. A run of some of",
        "them (`--only`) replaces their rows.",
        "",
        "| error | in | what it does | noticed by |",
        "|---|---|---|---|",
        *(
            (
                f"| {mutant.name} | `{mutant.file}` | {mutant.what.replace('|', BAR)} | "
                f"{shown(mutant.name).replace('|', BAR)} |"
            )
            for mutant in MUTANTS
        ),
        "",
        "## Survivors",
        "",
    ]
    survivors = [
        f"- {mutant.name}: {mutant.survives or 'not explained yet'}"
        for mutant in MUTANTS
        if mutant.name in killers and killers[mutant.name] is None
    ]
    return "\n".join([*lines, *(survivors or ["None."])]) + "\n"


def read_page(text: str) -> dict[str, str | None]:
    """The results that a page holds."""
    rows = re.findall(r"^\| (\S+) \| `.* \| (?:`(.+)`|\*\*nothing\*\*) \|$", text, re.MULTILINE)
    return {name: killer.replace(BAR, "|") or None for name, killer in rows}


def chosen(names: Sequence[str], table: Mapping[str, Mutant]) -> list[Mutant]:
    """The mutants of these names, all without any; SystemExit for a name that is none."""
    unknown = [name for name in names if name not in table]
    if unknown:
        raise SystemExit(f"There is no mutant {', '.join(unknown)}; there are {', '.join(table)}.")
    return [table[name] for name in names] if names else list(table.values())


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutants",
        description="Plant errors and count which of them the tests notice.",
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these mutants alone")
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="copies to work in at the same time"
    )
    parser.add_argument(
        "--page", type=pathlib.Path, default=PAGE, metavar="FILE", help="where the results go"
    )
    arguments = parser.parse_args()
    mutants = chosen(arguments.only, {mutant.name: mutant for mutant in MUTANTS})
    outcomes = run_all(mutants, arguments.jobs)
    for found in sorted(outcomes, key=lambda found: found.killed):
        print(
            f"{found.mutant.name:<34} {found.mutant.file:<26} {found.seconds:6.1f} s  "
            f"{found.killer or 'SURVIVES'}"
        )
    killers = {found.mutant.name: found.killer for found in outcomes}
    print(
        f"{summary(killers, mutants)}, in {sum(found.seconds for found in outcomes):.0f} s of tests"
    )
    before = (
        read_page(arguments.page.read_text(encoding="utf-8")) if arguments.page.exists() else {}
    )
    arguments.page.write_text(page(before | killers), encoding="utf-8")
    return 0 if sum(found.killed for found in outcomes) >= WANTED * len(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
