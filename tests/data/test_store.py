"""Prepared rows: atomic preparation, stale data, races, and no TensorFlow."""

from __future__ import annotations

import hashlib
import math
import os
import subprocess
import sys
import threading

import pytest

from perl_jax.data import store
from perl_jax.data.config import DataConfig
from perl_jax.data.tasks import PreparedTask, get_task
from perl_jax.errors import UserError
from tests.paths import ORDERS

SMALL = {"train_size": 20, "evaluation_size": 6}
KINDS = ("corpus", "demonstrations", "comparisons", "labels", "prompts")


def made(kind, split, size):
    """Rows whose texts and numbers say which row they are."""
    for n in range(size):
        fields = store.KINDS[kind]
        yield {
            field: n / 7 if field in store.NUMBERS else f"{field} {n} of {split}"
            for field in fields
            if field not in ("group", *store.FLAGS)
        }


class Counted(store.RowsBuilder):
    """A task that generates its rows."""

    name = "counted"

    @classmethod
    def kind_splits(cls):
        return dict.fromkeys(KINDS, store.SPLITS)

    @classmethod
    def content(cls, kind, config):
        return {"seed": config.data_seed, "sizes": [config.size(split) for split in store.SPLITS]}

    @classmethod
    def rows(cls, kind, split, config):
        return made(kind, split, config.size(split))


class Answered(Counted):
    """A task whose prompts have answers."""

    name = "answered"

    @classmethod
    def rows(cls, kind, split, config):
        return ({"prompt": f"{n}?", "answer": n, "note": {"n": [n]}} for n in range(3))


class Broken(Counted):
    """Fails after three rows."""

    name = "broken"

    @classmethod
    def rows(cls, kind, split, config):
        yield from made(kind, split, 3)
        raise OSError("disk on fire")


COUNTED = PreparedTask(Counted)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A folder of prepared rows for each test."""
    monkeypatch.setenv("PERL_JAX_CACHE", str(tmp_path / "cache"))


def small(**fields) -> DataConfig:
    return DataConfig(**{**SMALL, **fields})


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_reads_back_what_was_generated_in_order(tmp_path, kind):
    for split, size in (("train", 20), ("validation", 6), ("test", 6)):
        source = COUNTED.open(kind, split, small())
        expected = list(made(kind, split, size))
        assert len(source) == len(expected) == size
        for index, row in enumerate(expected):
            assert set(source[index]) == set(store.KINDS[kind]) - set(store.FLAGS)
            for field, value in row.items():
                assert type(source[index][field]) is (float if field in store.NUMBERS else str)
                assert source[index][field] == (
                    pytest.approx(value) if field in store.NUMBERS else value
                )
    with pytest.raises(IndexError):
        source[6]


class Unfinished(Counted):
    """A task with demonstrations that were cut."""

    name = "unfinished"

    @classmethod
    def rows(cls, kind, split, config):
        return ({"prompt": "p", "response": f"{n}", "finished": n > 0} for n in range(2))


def test_a_response_that_is_not_finished_is_stored_as_such(tmp_path):
    source = store.open_rows(Unfinished, "demonstrations", "train", small())
    assert list(source) == [
        {"prompt": "p", "response": "0", "finished": False, "group": ""},
        {"prompt": "p", "response": "1", "group": ""},
    ]


def test_a_task_of_ones_own_may_give_prompts_other_columns(tmp_path):
    source = store.open_rows(Answered, "prompts", "train", small())
    assert [source[i] for i in range(3)] == [
        {"prompt": f"{n}?", "answer": n, "note": {"n": [n]}} for n in range(3)
    ]


def test_kinds_splits_and_sizes_that_a_task_does_not_have(tmp_path):
    assert tuple(COUNTED.splits) == KINDS
    with pytest.raises(
        UserError, match="kind is 'pairs'; it must be one of corpus, demonstrations"
    ):
        COUNTED.open("pairs", "train", small())
    with pytest.raises(
        UserError, match="split of labels is 'judge'; it must be one of train, validation, test"
    ):
        COUNTED.open("labels", "judge", small())
    with pytest.raises(UserError, match=r"data\.train_size is 0"):
        small(train_size=0)


def test_folder_changes_with_seed_size_kind_and_code_only(tmp_path, monkeypatch):
    prints = {
        store.fingerprint(Counted, kind, small(**fields))
        for kind, fields in [
            ("labels", {}),
            ("labels", {"data_seed": 1}),
            ("labels", {"train_size": 21}),
            ("prompts", {}),
        ]
    }
    assert len(prints) == 4
    again = DataConfig(data_dir="unused", **SMALL)
    assert store.fingerprint(Counted, "labels", again) in prints
    monkeypatch.setattr(store, "file_hash", lambda path: "another version of the code")
    assert store.fingerprint(Counted, "labels", small()) not in prints


def test_prepared_rows_are_used_again(tmp_path, monkeypatch):
    task = COUNTED
    first = task.open("prompts", "train", small())[0]
    (folder,) = (tmp_path / "cache").iterdir()
    assert folder.name.startswith("counted-prompts-")
    monkeypatch.setattr(Counted, "rows", None)  # would fail if called
    assert task.open("prompts", "train", small())[0] == first


def test_failure_midway_leaves_nothing(tmp_path):
    with pytest.raises(OSError, match="disk on fire"):
        store.open_rows(Broken, "prompts", "train", small())
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_process_killed_when_all_is_written_leaves_nothing_that_is_read(tmp_path):
    """Dies at the last moment, before the rename: the folder that readers look for is not there."""
    code = (
        "import os\n"
        "from perl_jax.data.config import DataConfig\n"
        "from perl_jax.data.tasks import get_task\n"
        "replace = os.replace\n"
        "ours = lambda path: os.path.basename(path).startswith('.orders-prompts-')\n"
        "os.replace = lambda source, target: os._exit(9) if ours(source) else replace(source, "
        "target)\n"
        "config = DataConfig(train_size=20, evaluation_size=6)\n"
        f"get_task({ORDERS!r}).open('prompts', 'train', config)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 9, done.stderr
    (left,) = (tmp_path / "cache").iterdir()
    assert left.name.startswith(".orders-prompts-")
    assert len(get_task(ORDERS).open("prompts", "train", small())) == 20
    # What the dead process left is gone.
    assert not left.exists() and len(list((tmp_path / "cache").iterdir())) == 1


def test_the_loser_of_a_race_uses_the_winners_rows(tmp_path, monkeypatch):
    """Both see no folder and prepare; the second to finish must neither fail nor replace."""
    both_ready, original, folders = threading.Barrier(2), os.replace, []

    def rename_together(source, target):
        if ".counted-prompts" in os.path.basename(str(source)):
            both_ready.wait(timeout=60)
        original(source, target)

    monkeypatch.setattr(os, "replace", rename_together)
    # Only the redirection of standard output is not made for threads.
    monkeypatch.setattr(
        store.contextlib, "redirect_stdout", lambda stream: store.contextlib.nullcontext()
    )
    run = lambda: folders.append(store.prepare(Counted, "prompts", small()))
    threads = [threading.Thread(target=run) for _ in range(2)]
    [thread.start() for thread in threads]
    [thread.join(timeout=120) for thread in threads]
    assert len(folders) == 2
    assert folders[0] == folders[1]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [folders[0].name]
    assert len(COUNTED.open("prompts", "train", small())) == 20


def test_cache_variable_is_the_default(tmp_path, monkeypatch):
    monkeypatch.setenv("PERL_JAX_CACHE", str(tmp_path / "by variable"))
    assert store.cache_folder() == tmp_path / "by variable"
    monkeypatch.delenv("PERL_JAX_CACHE")
    assert store.cache_folder().parts[-3:] == (".cache", "perl_jax", "datasets")
    monkeypatch.setenv(store.CACHE_VARIABLE, str(tmp_path / os.fsdecode(b"a\xff")))
    with pytest.raises(UserError, match="bytes in its path that are not UTF-8"):
        store.cache_folder()


def test_unknown_probability_survives_storage(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "p", "chosen": "a", "rejected": "b"}\n')
    wanted = DataConfig(data_dir=str(path))
    splits = []
    for split in store.SPLITS:
        try:
            splits.append(get_task("jsonl").open("comparisons", split, wanted))
        except UserError as error:
            assert "has no comparisons rows in its" in str(error)  # noqa: PT017  of two splits
    (source,) = splits
    assert math.isnan(source[0]["probability"])


def test_tensorflow_is_not_imported_and_nothing_is_printed(tmp_path):
    code = (
        "import sys\n"
        "from perl_jax.data.config import DataConfig\n"
        "from perl_jax.data.tasks import get_task\n"
        "config = DataConfig(train_size=5, evaluation_size=2)\n"
        f"assert len(get_task({ORDERS!r}).open('labels', 'train', config)) == 5\n"
        "assert 'tensorflow' not in sys.modules, 'tensorflow was imported'\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def test_a_part_has_its_first_percentile_and_not_its_last():
    for number in range(200):
        text = f"text {number}"
        own = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") % 100
        assert (
            store.part_of(text, {"below": (0, own), "own": (own, own + 1), "above": (own + 1, 100)})
            == "own"
        )


def test_a_cache_that_cannot_be_written_names_the_variable(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PERL_JAX_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match=r"a part of the path is a file.* PERL_JAX_CACHE names"):
        COUNTED.open("prompts", "train", small())


def test_a_cache_that_fills_up_is_a_sentence_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("PERL_JAX_CACHE", str(tmp_path / "cache"))

    def fails(*_, **__):
        raise RuntimeError("RESOURCE_EXHAUSTED: write of 8 bytes: No space left on device")

    monkeypatch.setattr(Counted, "download_and_prepare", fails)
    with pytest.raises(UserError, match=r"cache of prepared rows in .*: the disk is full"):
        COUNTED.open("prompts", "train", small())
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_file_that_a_task_does_not_find_is_not_blamed_on_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PERL_JAX_CACHE", str(tmp_path / "cache"))

    def reads(*_, **__):
        (tmp_path / "gone").read_text()

    monkeypatch.setattr(Counted, "download_and_prepare", reads)
    with pytest.raises(UserError, match="/gone cannot be used: there is no such file"):
        COUNTED.open("prompts", "train", small())
