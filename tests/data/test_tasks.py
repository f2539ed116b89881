"""Tasks by name and by file: which there are, what they read, and sentences for what goes wrong."""

from __future__ import annotations

import ast
import pathlib
import re
from collections.abc import Iterator

import pytest

import perl_jax
from perl_jax.data.config import DataConfig
from perl_jax.data.dataset import of_split
from perl_jax.data.tasks import FORMER, TASKS, Task, get_task, task_of
from perl_jax.errors import UserError
from tests.paths import ORDERS

PACKAGE = pathlib.Path(perl_jax.__file__).parent
# In names and texts that are about a data set; `orders` by itself is a word of its own.
DATA_SETS = re.compile(r"taskmaster|orders_language|redial|experiments\b", re.IGNORECASE)


def test_only_json_lines_are_built_in():
    assert list(TASKS) == ["jsonl"]
    assert DataConfig().task == "jsonl" and get_task("jsonl").gold is None
    with pytest.raises(UserError) as error:
        of_split(DataConfig(), "prompts", "test")
    assert str(error.value) == (
        "The task jsonl needs --data.data-dir: a .jsonl file, or a folder of them; --data.task "
        "PATH.py:NAME names another task."
    )


def test_the_task_of_an_experiment_is_opened_by_its_file():
    task = get_task(ORDERS)
    assert task.name == "orders" and task.gold(["x"], ["y"]).tolist() == [-1.0]
    assert {"add", "latte"} < set(task.vocabulary)


@pytest.mark.parametrize("name", FORMER)
def test_a_former_name_says_where_the_task_is(name):
    with pytest.raises(UserError) as error:
        get_task(name)
    assert str(error.value) == (
        f"data.task is {name!r}, which is not part of the package any more; give its file in the "
        f"repository of perl_jax: {FORMER[name]}."
    )
    path, _, task = FORMER[name].partition(":")
    assert get_task(f"{PACKAGE.parent / path}:{task}").name == name


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"task": "jsonl", "data_dir": "d", "data_seed": 1},
            "data_seed is 1, which the task jsonl",
        ),
        ({"task": ORDERS, "data_dir": "d"}, "data_dir is 'd', which the task orders"),
    ],
)
def test_an_option_that_a_task_does_not_read_is_refused(fields, message):
    config = DataConfig(**fields)
    with pytest.raises(UserError) as error:
        of_split(config, "prompts", "test")
    assert str(error.value) == f"data.{message} does not read; leave it out."


def test_options_that_a_task_reads_are_taken():
    assert task_of(DataConfig(data_dir="d")).name == "jsonl"
    assert task_of(DataConfig(task=ORDERS, data_seed=1)).name == "orders"
    with pytest.raises(UserError, match="mine: option is 'seed'; it must be one of data_dir"):
        Task("mine", lambda kind, split, options: [], {}, options=("seed",))


def test_a_task_imports_files_beside_its_own(tmp_path):
    code = "import perl_jax as pj\nfrom .{0} import NAME\nA, B = pj.Task(NAME, list, {{}}), NAME\n"
    for folder, beside in (("one", "words"), ("two", "words")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{beside}.py").write_text(f"NAME = {folder!r}")
        (tmp_path / folder / "data.py").write_text(code.format(beside))
    # Two files of one name are two modules.
    assert [get_task(f"{tmp_path / name}/data.py:A").name for name in ("one", "two")] == [
        "one",
        "two",
    ]
    assert get_task(f"{tmp_path}/one/data.py:A") is get_task(f"{tmp_path}/one/data.py:A")
    with pytest.raises(UserError, match=r"has no perl_jax\.Task that is called B"):
        get_task(f"{tmp_path}/one/data.py:B")


def named(source: str) -> Iterator[str]:
    """Names and texts of a file's code that are those of data sets; not docstrings and comments."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Assign(targets=[ast.Name("FORMER")], value=ast.Dict(keys, values)):
                # The one place that may: it says where they are.
                for text in (*keys, *values):
                    text.value = ""
            case ast.Expr(value=ast.Constant()):
                node.value.value = ""
            case ast.Constant(value=str(text)) if text == "orders" or DATA_SETS.search(text):
                yield text
            case (
                ast.Name(id=text)
                | ast.alias(name=text)
                | ast.Attribute(attr=text)
                | ast.ImportFrom(module=str(text))
            ) if DATA_SETS.search(text):
                yield text


def test_the_package_names_no_data_set():
    files = sorted(PACKAGE.rglob("*.py"))
    texts = {str(path): path.read_text(encoding="utf-8") for path in files}
    # Only what holds such a word at all is parsed.
    found = {
        path: [*named(text)]
        for path, text in texts.items()
        if DATA_SETS.search(text) or '"orders"' in text
    }
    assert len(found) < len(texts)
    assert not any(found.values()), found


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("if config.data.task == 'orders': x()", ["orders"]),
        ("from perl_jax.data import orders_language", ["orders_language"]),
        ("from experiments.orders.data import ORDERS", ["experiments.orders.data"]),
        ("taskmaster.rows()", ["taskmaster"]),
        ('"""Prefers taskmaster."""\norders = "both orders"  # redial', []),
        ("FORMER = {'orders': 'experiments/orders/data.py:ORDERS'}", []),
    ],
)
def test_names_of_data_sets_are_seen(source, found):
    assert [*named(source)] == found
