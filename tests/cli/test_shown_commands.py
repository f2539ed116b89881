"""The commands that the documentation shows are commands: their flags exist and take the values."""

from __future__ import annotations

import re
import shlex

import pytest

from perl_jax.cli import main as cli
from tests.test_docs import PAGES, ROOT


def shown_commands(text: str) -> list[list[str]]:
    """Returns the arguments of each `perl-jax` command in a page's blocks of code.

    Lines that end in a backslash are joined. Commands with `...` leave something out and do not
    count.
    """
    blocks = re.findall(r"^    .*(?:\n    .*)*", text, flags=re.MULTILINE)
    joined = [re.sub(r"\\\n", " ", block) for block in blocks]
    lines = [re.sub(r"\s+#.*", "", line) for block in joined for line in block.splitlines()]
    found = [line.partition("perl-jax ")[2] for line in lines if "perl-jax " in line]
    return [shlex.split(line) for line in found if "..." not in line]


def test_the_pages_show_commands():
    assert shown_commands("    a=1 perl-jax sft --run r \\\n       --steps 2   # why\n") == [
        ["sft", "--run", "r", "--steps", "2"]
    ]
    assert shown_commands("text `perl-jax sft`\n\n    perl-jax rl ... --steps 2\n") == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if shown_commands(page.read_text())],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_shown_commands_are_taken(page, tmp_path):
    text, written = page.read_text(), {}
    for file, content in re.findall(r"`(\S+\.yaml)`:\n\n```yaml\n(.*?)```", text, re.DOTALL):
        (tmp_path / file).write_text(content)
        written[file] = str(tmp_path / file)
    for name, *rest in shown_commands(text):
        cli._config(name, cli._command(name)[0], [written.get(word, word) for word in rest])
