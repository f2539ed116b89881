"""Runs the mutants: each in a copy of the tracked files, against the tests that should notice it.

    python -m tests.mutants [--only NAME ...] [--jobs N] [--page FILE]

First all tests that the mutants name run without any mutant: one that fails or is skipped there can
notice nothing, and its mutants count as survivors. Then one mutant at a time is put into a copy, and its
tests run until the first that fails. The checkout is never written to, but for the page with the
results (docs/mutants.md) when the whole table has run. The exit status is 1 when fewer than 95 % of
the mutants are noticed.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
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


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a mutant. killer: the test that failed, or how it ended otherwise; None: it survived."""

    mutant: Mutant
    killer: str | None
    seconds: float

    @property
    def killed(self) -> bool:
        return self.killer is not None


def copy_tracked(folder: pathlib.Path) -> None:
    """Copies the files that git tracks, as they are in the checkout now."""
    listed = subprocess.run(["git", "ls-files", "-z", "perl_jax", "tests", "experiments", "launch", "setup.cfg"], cwd=CHECKOUT, capture_output=True, check=True)
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (CHECKOUT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(CHECKOUT / name, folder / name)


def environment(folder: pathlib.Path, programs: pathlib.Path) -> dict[str, str]:
    """Of a test process: it imports from the copy, and shares compiled programs with the others."""
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    shared = {"PERL_JAX_SHARED": str(CHECKOUT.parent / "shared"), "JAX_COMPILATION_CACHE_DIR": str(programs)} | os.environ
    return shared | {"PYTHONPATH": os.pathsep.join(paths), ROOT: str(folder), "PYTHONDONTWRITEBYTECODE": "1"}


def run_tests(folder: pathlib.Path, programs: pathlib.Path, tests: Sequence[str], *options: str) -> tuple[int | None, str]:
    """(pytest's exit status, its output); the status is None after the time limit."""
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", "-p", "tests.mutants.guard", "-m", "not exhaustive", "--tb=line", *options]
    try:
        done = subprocess.run([*command, *(f"tests/{test}" for test in tests)], cwd=folder, env=environment(folder, programs), capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return None, ""
    return done.returncode, done.stdout + done.stderr


def reported(output: str, words: str) -> list[str]:
    """The tests that the summary lists under one of the words: `FAILED tests/a.py::test_b - why`."""
    return re.findall(rf"^(?:{words}) tests/(.+?)(?: - .*)?$", output, re.MULTILINE)


def of_selection(test: str, selection: str) -> bool:
    """Whether a test (or, of a skipped one, its file and line) is among those that a mutant names."""
    return test == selection or test.startswith((f"{selection}::", f"{selection}["))


def unfit(folder: pathlib.Path, programs: pathlib.Path, mutants: Iterable[Mutant]) -> tuple[set[str], str]:
    """The selections of which a test fails without any mutant, and pytest's output."""
    selections = sorted({test for mutant in mutants for test in mutant.tests})
    status, output = run_tests(folder, programs, selections, "-rfE")
    if status not in (PASSED, FAILED):
        raise SystemExit(f"The tests do not run without a mutant:\n{output[-4000:]}")
    bad = reported(output, "FAILED|ERROR")
    return {selection for selection in selections if any(of_selection(test, selection) for test in bad)}, output


def outcome(mutant: Mutant, folder: pathlib.Path, programs: pathlib.Path) -> Outcome:
    """Plants a mutant in a copy, runs its tests, and takes it out again."""
    path = folder / "perl_jax" / mutant.file
    original = path.read_text(encoding="utf-8")
    begin = time.perf_counter()
    path.write_text(mutant.planted(original), encoding="utf-8")
    try:
        status, output = run_tests(folder, programs, mutant.tests, "-x", "-rfE")
    finally:
        path.write_text(original, encoding="utf-8")
    seconds = time.perf_counter() - begin
    if status not in (PASSED, FAILED, None):
        raise SystemExit(f"{mutant.name}: the tests did not run (pytest's status {status}); a mutant must be importable:\n{output[-4000:]}")
    if status is None:
        return Outcome(mutant, "the time limit", seconds)
    return Outcome(mutant, None if status == PASSED else next(iter(reported(output, "FAILED|ERROR")), "a test"), seconds)


def run_all(mutants: Sequence[Mutant], jobs: int) -> list[Outcome]:
    """Every mutant's outcome, in the table's order; said as they come."""
    with tempfile.TemporaryDirectory(prefix="perl_jax_mutants_") as temporary:
        root = pathlib.Path(temporary).resolve()
        copies: queue.Queue[pathlib.Path] = queue.Queue()
        for number in range(jobs):
            copy_tracked(root / str(number))
            copies.put(root / str(number))
        programs = pathlib.Path(os.environ.get("JAX_COMPILATION_CACHE_DIR", root / "programs"))
        begin = time.perf_counter()
        bad, output = unfit(root / "0", programs, mutants)
        print(f"{len({test for m in mutants for test in m.tests})} selections of tests without a mutant: {time.perf_counter() - begin:.0f} s", flush=True)
        if bad:
            print(f"{output[-4000:]}\nThese fail without a mutant: {', '.join(sorted(bad))}.", flush=True)

        def one(mutant: Mutant) -> Outcome:
            if bad.intersection(mutant.tests):
                return Outcome(mutant, None, 0.0)
            folder = copies.get()
            try:
                found = outcome(mutant, folder, programs)
            finally:
                copies.put(folder)
            print(f"{'killed  ' if found.killed else 'SURVIVES'} {mutant.name:<34} {found.seconds:5.1f} s  {found.killer or ''}", flush=True)
            return found

        with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
            return list(pool.map(one, mutants))


def summary(outcomes: Sequence[Outcome]) -> str:
    """How many were noticed."""
    killed = sum(found.killed for found in outcomes)
    files = len({found.mutant.file for found in outcomes})
    return f"{killed} of {len(outcomes)} mutants in {files} files killed ({killed / len(outcomes):.1%}), {sum(found.seconds for found in outcomes):.0f} s of tests"


def page(outcomes: Sequence[Outcome]) -> str:
    """The results as Markdown."""
    survivors = [found for found in outcomes if not found.killed]
    lines = [
        "# Planted errors, and the tests that notice them",
        "",
        "Written by `make mutants`, which puts one error at a time into a copy of the package and runs the tests that should notice it.",
        f"{summary(outcomes)}. The table is `tests/mutants/table.py`: an error there is text to replace, which a quick test keeps up to date.",
        "",
        "| error | in | what it does | noticed by |",
        "|---|---|---|---|",
    ]
    for found in outcomes:
        killer = f"`{found.killer}`" if found.killer else "**nothing**"
        lines.append(f"| {found.mutant.name} | `{found.mutant.file}` | {found.mutant.what} | {killer.replace('|', chr(92) + '|')} |")
    lines += ["", "## Survivors", ""]
    lines += [f"- {found.mutant.name}: {found.mutant.survives or 'not explained yet'}" for found in survivors] or ["None."]
    return "\n".join(lines) + "\n"


def chosen(names: Sequence[str], table: Mapping[str, Mutant]) -> list[Mutant]:
    """The mutants of these names, all without any; SystemExit for a name that is none."""
    unknown = [name for name in names if name not in table]
    if unknown:
        raise SystemExit(f"There is no mutant {', '.join(unknown)}; there are {', '.join(table)}.")
    return [table[name] for name in names] if names else list(table.values())


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description="Plant errors and count which of them the tests notice.")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these mutants alone; no page is written")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="copies to work in at the same time")
    parser.add_argument("--page", type=pathlib.Path, default=PAGE, metavar="FILE", help="where the results of the whole table go")
    arguments = parser.parse_args()
    mutants = chosen(arguments.only, {mutant.name: mutant for mutant in MUTANTS})
    outcomes = run_all(mutants, arguments.jobs)
    for found in sorted(outcomes, key=lambda found: found.killed):
        print(f"{found.mutant.name:<34} {found.mutant.file:<26} {found.seconds:6.1f} s  {found.killer or 'SURVIVES'}")
    print(summary(outcomes))
    if not arguments.only:
        arguments.page.write_text(page(outcomes), encoding="utf-8")
    return 0 if sum(found.killed for found in outcomes) >= WANTED * len(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
