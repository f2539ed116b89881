"""The table of planted errors fits the package and the tests as they are now; running it is `make
mutants`.
"""

from __future__ import annotations

import functools
import pathlib
import re

import pytest

from tests.mutants.table import MUTANTS, Mutant

TESTS = pathlib.Path(__file__).parent


@functools.cache
def text_of(path: pathlib.Path) -> str:
    return path.read_text(encoding="utf-8")


@functools.cache
def names_in(path: pathlib.Path) -> frozenset[str]:
    """`test_a` and `TestB::test_c` of a file."""
    found, group = set(), ""
    for kind, inside, name in re.findall(r"^(class |( *)def )(\w+)", text_of(path), re.MULTILINE):
        if kind == "class ":
            group = f"{name}::"
        else:
            found.add(f"{group}{name}" if inside else name)
    return frozenset(found)


def test_every_planted_error_has_its_place_and_its_tests():
    problems = []
    for mutant in MUTANTS:
        try:
            mutant.planted(text_of(TESTS.parent / mutant.path))
        except (OSError, ValueError) as error:
            problems.append(f"{mutant.name}: {error}")
        if not mutant.tests or mutant.old == mutant.new:
            problems.append(f"{mutant.name} has no tests, or changes nothing")
        for test in mutant.tests:
            file, _, name = test.partition("::")
            if not (TESTS / file).is_file() or (
                name and name.partition("[")[0] not in names_in(TESTS / file)
            ):
                problems.append(f"{mutant.name} names the test {test}, which does not exist")
    assert not problems, "\n".join(problems)


def test_the_page_is_of_this_table():
    names = [mutant.name for mutant in MUTANTS]
    assert (
        len(names) == len(set(names))
        and len(names) >= 65
        and len({mutant.file for mutant in MUTANTS}) >= 25
    )
    page = text_of(TESTS.parent / "docs" / "mutants.md")
    assert re.findall(r"^\| (\S+) \|", page, re.MULTILINE)[1:] == names


def test_an_error_without_its_place_is_named():
    with pytest.raises(ValueError, match=r"lost: the text to replace is 2 times in perl_jax/a\.py"):
        Mutant("lost", "a.py", "x", "y", "", ("a.py",)).planted("x + x")
