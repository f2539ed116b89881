"""The table of planted errors fits the package and the tests as they are now; running it is `make mutants`."""

from __future__ import annotations

import ast
import functools
import pathlib

import pytest

from tests.mutants.table import MUTANTS, Mutant

TESTS = pathlib.Path(__file__).parent
PACKAGE = TESTS.parent / "perl_jax"


@functools.cache
def text_of(path: pathlib.Path) -> str:
    return path.read_text(encoding="utf-8")


@functools.cache
def tests_of(path: pathlib.Path) -> frozenset[str]:
    """`test_a` and `TestB::test_c` of a file."""
    found = set()
    for node in ast.parse(text_of(path)).body:
        if isinstance(node, ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.ClassDef):
            found |= {f"{node.name}::{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return frozenset(found)


def test_every_planted_error_has_its_place_and_its_tests():
    problems = []
    for mutant in MUTANTS:
        try:
            ast.parse(mutant.planted(text_of(PACKAGE / mutant.file)))
        except (OSError, SyntaxError, ValueError) as error:
            problems.append(f"{mutant.name}: {error}")
        if not mutant.tests or mutant.old == mutant.new:
            problems.append(f"{mutant.name} has no tests, or changes nothing")
        for test in mutant.tests:
            file, _, name = test.partition("::")
            if not (TESTS / file).is_file() or (name and name.partition("[")[0] not in tests_of(TESTS / file)):
                problems.append(f"{mutant.name} names the test {test}, which does not exist")
    assert not problems, "\n".join(problems)


def test_the_table_is_as_large_as_it_says():
    names = [mutant.name for mutant in MUTANTS]
    assert len(names) == len(set(names)) >= 65 and len({mutant.file for mutant in MUTANTS}) >= 25
    page = text_of(TESTS.parent / "docs" / "mutants.md")
    assert [name for name in names if f"| {name} |" not in page] == []


def test_an_error_without_its_place_is_named():
    with pytest.raises(ValueError, match="lost: the text to replace is 2 times in perl_jax/a.py"):
        Mutant("lost", "a.py", "x", "y", "", ("a.py",)).planted("x + x")
