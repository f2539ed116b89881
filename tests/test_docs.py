"""What the documentation names exists: modules, functions, classes, files, links.

The source is parsed, not imported.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAME = re.compile(r"`(perl_jax(?:\.\w+)+)(?:\(\))?`")
# In backticks: a file or folder of the repository, with its path from the root or below docs/.
FILE = re.compile(r"`((?:perl_jax|experiments|tests|launch|docs)/[\w./-]*)`")
LINK = re.compile(r"\]\(([^)#\s:]+)(?:#[^)\s]*)?\)")


@functools.cache
def definitions(path: Path) -> dict[str, ast.AST | None]:
    """The names that a file defines or imports at its top level; the value is a class's node, or
    None.
    """
    return dict(_defined(ast.parse(path.read_text()).body))


def _defined(body: list[ast.stmt]) -> Iterator[tuple[str, ast.AST | None]]:
    for node in body:
        match node:
            case ast.ClassDef():
                yield node.name, node
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                yield node.name, None
            case ast.Assign():
                yield from ((t.id, None) for t in node.targets if isinstance(t, ast.Name))
            case ast.AnnAssign(target=ast.Name(id=name)):
                yield name, None
            case ast.Import() | ast.ImportFrom():
                yield from ((a.asname or a.name.split(".")[0], None) for a in node.names)
            case ast.If() | ast.Try():
                yield from _defined(node.body)
                yield from _defined(node.orelse)


def exists(dotted: str, root: Path = ROOT) -> bool:
    """Whether `perl_jax.a.b.Class.method` is a room, a module, or something defined there."""
    here, parts = root, dotted.split(".")
    while parts and (here / parts[0]).is_dir():
        here, parts = here / parts[0], parts[1:]
    if parts and (here / f"{parts[0]}.py").is_file():
        path, parts = here / f"{parts[0]}.py", parts[1:]
    else:
        path = here / "__init__.py"
    names = definitions(path)
    while parts:
        if parts[0] not in names:
            return False
        inside = names[parts[0]]
        names = dict(_defined(inside.body)) if isinstance(inside, ast.ClassDef) else {}
        parts = parts[1:]
    return True


@pytest.mark.parametrize(
    ("dotted", "expected"),
    [
        ("perl_jax.objectives", True),
        ("perl_jax.objectives.losses", True),
        ("perl_jax.objectives.losses.reduce_tokens", True),
        ("perl_jax.objectives.algorithms.Algorithm.critic", True),
        ("perl_jax.objectives.algorithms.Algorithm.no_such_method", False),
        ("perl_jax.objectives.losses.no_such_function", False),
        ("perl_jax.objectives.no_such_module.f", False),
        ("perl_jax.no_such_room", False),
    ],
)
def test_a_name_is_found_where_it_is_defined(dotted: str, expected: bool):
    assert exists(dotted) == expected


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_exists(page: Path):
    text = page.read_text()
    missing = [name for name in NAME.findall(text) if not exists(name)]
    missing += [name for name in FILE.findall(text) if not (ROOT / name).exists()]
    missing += [link for link in LINK.findall(text) if not (page.parent / link).exists()]
    assert not missing, f"{page.relative_to(ROOT)} names what does not exist: {missing}"


def test_pages_name_the_package():
    """The patterns find something, so that the test above can fail."""
    found = [name for page in PAGES for name in NAME.findall(page.read_text())]
    assert len(found) >= 20


@pytest.mark.parametrize(
    "example", sorted((ROOT / "docs" / "examples").glob("*.py")), ids=lambda path: path.name
)
def test_the_examples_that_pages_show_are_the_files_that_tests_run(example: Path):
    text = example.read_text().strip()
    assert any(f"```python\n{text}\n```" in page.read_text() for page in PAGES), example.name


def test_readme_is_read_in_three_minutes():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    pages = [str(page.relative_to(ROOT / "docs")) for page in PAGES[1:]]
    assert [page for page in pages if page not in navigation] == []


def test_the_api_page_has_every_public_name():
    package = ast.parse((ROOT / "perl_jax" / "__init__.py").read_text())
    (names,) = (
        ast.literal_eval(node.value)
        for node in package.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_HOMES"
    )
    page = (ROOT / "docs" / "api" / "index.md").read_text()
    shown = re.findall(r"^::: perl_jax\.(\w+)$", page, flags=re.MULTILINE)
    assert sorted(shown) == sorted(names)
