"""The user's JSON Lines: what is read, how it is split, and messages that say where it is wrong."""

from __future__ import annotations

import contextlib
import json
import math

import numpy as np
import pytest

from perl_jax.data import jsonl, row_checks
from perl_jax.data.config import DataConfig
from perl_jax.data.store import KINDS, SPLITS, group_of
from perl_jax.data.tasks import get_task
from perl_jax.errors import UserError


def write(path, *rows):
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8"
    )
    return path


def test_reads_wanted_fields_only(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        {"prompt": "é\n 日本", "response": " b ", "label": 1, "note": 3},
        "",
        "  ",
    )
    assert jsonl.read_jsonl(path, ("prompt", "response", "label")) == [
        {"prompt": "é\n 日本", "response": " b ", "label": 1.0}
    ]
    assert jsonl.read_jsonl(path, ("prompt",)) == [{"prompt": "é\n 日本"}]


def test_byte_order_mark_and_windows_line_ends(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n{"prompt": "b"}\r\n')
    assert [row["prompt"] for row in jsonl.read_jsonl(path, ("prompt",))] == ["a", "b"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"a\.jsonl, line 3: not valid JSON \(.*column 2\)"),
        ("[1]", r"line 3: must be a JSON object with prompt, response, label"),
        (
            '{"prompt": "p", "response": "r"}',
            "line 3: the field label is missing; rows have prompt, response and label; this row "
            r"has prompt and response, as demonstrations do\.$",
        ),
        (
            '{"prompt": 1, "response": "r", "label": 1}',
            "line 3: the field prompt is a number; it must be a string",
        ),
        ('{"prompt": "p", "response": " ", "label": 1}', "line 3: the field response is empty"),
        (
            '{"prompt": "p", "response": "r", "label": "1"}',
            "line 3: the field label is '1'; it must be a number",
        ),
        (
            '{"prompt": "p", "response": "r", "label": true}',
            "line 3: the field label is True; it must be a number",
        ),
        (
            '{"prompt": "p", "response": "r", "label": 1.5}',
            r"line 3: the field label is 1\.5; it must be a number in \[0, 1\]",
        ),
        (
            '{"prompt": "p", "response": "r", "label": NaN}',
            r"line 3: the field label is nan; it must be a number in \[0, 1\]",
        ),
        (
            '{"prompt": "\\ud800", "response": "r", "label": 1}',
            "line 3: the field prompt has half of a surrogate",
        ),
        ("[" * 100_000, "line 3: not valid JSON"),
        ("9" * 10_000, "line 3: not valid JSON"),
        (
            '{"prompt": "p", "response": "r", "label": 1' + "0" * 400 + "}",
            "line 3: the field label is 10+; it must be a number in",
        ),
    ],
)
def test_errors_name_file_line_and_field(tmp_path, line, message):
    good = {"prompt": "p", "response": "r", "label": 0}
    path = write(tmp_path / "a.jsonl", good, "", line)
    with pytest.raises(UserError, match=message):
        jsonl.read_jsonl(path, ("prompt", "response", "label"))


def test_errors_of_whole_files(tmp_path):
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes('{"prompt": "é"}\n'.encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.jsonl, line 1: not UTF-8 text \(byte 12\)"):
        jsonl.read_jsonl(latin, ("prompt",))
    with pytest.raises(
        UserError, match=r"empty\.jsonl is empty; it must hold one JSON object a line"
    ):
        jsonl.read_jsonl(write(tmp_path / "empty.jsonl"), ("prompt",))
    with pytest.raises(UserError, match=r"gone\.jsonl cannot be read: there is no such file"):
        jsonl.read_jsonl(tmp_path / "gone.jsonl", ("prompt",))


def opened(path, kind, split):
    source = get_task("jsonl").open(kind, split, DataConfig(data_dir=str(path)))
    return [source[i] for i in range(len(source))]


def test_one_file_is_split_by_prompt(tmp_path):
    rows = [{"prompt": f"question {i % 100}", "response": f"answer {i}"} for i in range(200)]
    path = write(tmp_path / "rows.jsonl", *rows)
    parts = {
        split: opened(path, "demonstrations", split) for split in ("train", "validation", "test")
    }
    assert sorted(row["response"] for part in parts.values() for row in part) == sorted(
        row["response"] for row in rows
    )
    prompts = {split: {row["prompt"] for row in part} for split, part in parts.items()}
    assert not prompts["train"] & (prompts["validation"] | prompts["test"])
    assert not prompts["validation"] & prompts["test"]
    assert 140 <= len(parts["train"]) <= 180
    # The first of a kind's fields decides: every kind of rows keeps equal prompts together.
    assert all(fields[0] in ("prompt", "text") for fields in KINDS.values())


def test_folder_with_a_file_for_each_split(tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    write(folder / "train.jsonl", {"text": "one"}, {"text": "two"})
    write(folder / "test.jsonl", {"text": "three"})
    assert opened(folder, "corpus", "train") == [{"text": "one"}, {"text": "two"}]
    assert opened(folder, "corpus", "test") == [{"text": "three"}]
    with pytest.raises(UserError) as caught:
        opened(folder, "corpus", "validation")
    assert str(caught.value) == (
        f"{folder} has no corpus rows in its validation split: there is no file "
        f"{folder / 'validation.jsonl'}."
    )


@pytest.mark.parametrize(
    ("kind", "rows", "size", "by", "split", "names"),
    [
        (
            "demonstrations",
            [{"prompt": "p", "response": "r"}] * 2,
            "2 rows",
            "prompt",
            "validation",
            "train.jsonl and validation.jsonl",
        ),
        ("corpus", [{"text": "t", "split": "test"}], "1 row", "text", "train", "train.jsonl"),
    ],
)
def test_a_file_too_small_for_a_split_says_how_it_is_split(
    tmp_path, kind, rows, size, by, split, names
):
    path = write(tmp_path / "few.jsonl", *rows)
    with pytest.raises(UserError) as caught:
        opened(path, kind, split)
    assert str(caught.value) == (
        f"{path} has no {kind} rows in its {split} split: it has {size}, and the rows of a single "
        "file are split 80/10/10 (train, validation, test) by a hash of their group, or of their "
        f"{by} without one; give more rows, a folder with {names}, or rows with "
        f'"split": "{split}".'
    )


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        (
            "demonstrations",
            {"prompt": "p", "chosen": "a", "rejected": "b", "source": 1},
            "the field response is missing; demonstrations have prompt and response; this row has "
            "prompt, chosen, rejected and source, as comparisons do.",
        ),
        (
            "labels",
            {"prompt": "p", "ranked": ["a", "b"]},
            "the fields response and label are missing; labels have prompt, response and label; "
            "this row has prompt and ranked, as comparisons do.",
        ),
        (
            "comparisons",
            {"prompt": "p", "response": "a", "rating": 3, "group": "g"},
            "the fields chosen and rejected are missing; comparisons have prompt, chosen and "
            "rejected, or ranked instead of chosen and rejected; this row has prompt, response, "
            "rating and group, as ratings do.",
        ),
        (
            "demonstrations",
            {"prompt": "p", "chosen": "a"},
            "the field response is missing; demonstrations have prompt and response; this row has "
            "prompt and chosen.",
        ),
        (
            "prompts",
            {},
            "the field prompt is missing; prompts have prompt; this row has no fields.",
        ),
        (
            "corpus",
            {"a\nb": 1, **{f"x{i}": i for i in range(9)}},
            "the field text is missing; corpus rows have text; this row has 'a\\nb', x0, x1, x2, "
            "x3, x4, x5, x6 and 2 more.",
        ),
    ],
)
def test_a_row_of_another_kind_is_named(tmp_path, kind, row, message):
    path = write(tmp_path / "a.jsonl", row)
    with pytest.raises(UserError) as caught:
        opened(path, kind, "train")
    assert str(caught.value) == f"{path}, line 1: {message}"


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (3, "a number"),
        (2.5, "a number"),
        (np.float32(1), "a number"),
        (None, "null"),
        (False, "false"),
        (["p"], "a list"),
        ({"a": 1}, "an object"),
        (b"p", "of the type bytes"),
    ],
)
def test_a_value_of_another_type_is_said_in_words(value, words):
    with pytest.raises(UserError) as caught:
        row_checks.checked_rows({"prompt": value}, KINDS["prompts"], "Here")
    assert str(caught.value) == f"Here: the field prompt is {words}; it must be a string."


def test_a_changed_file_is_read_anew(tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    write(folder / "train.jsonl", {"prompt": "old"})
    assert opened(folder, "prompts", "train") == [{"prompt": "old"}]
    write(folder / "train.jsonl", {"prompt": "new"})
    assert opened(folder, "prompts", "train") == [{"prompt": "new"}]


def test_other_columns_of_prompts_come_as_they_are(tmp_path):
    rows = [
        {"prompt": "6 x 7?", "answer": 42, "source": {"book": ["é", None]}, "others": "mine"},
        {"prompt": "half?", "answer": 0.5, "hard": True, "sign": "\u20ac"},
        {"prompt": "which?", "answer": "b"},
        {"prompt": "bare"},
    ]
    folder = tmp_path / "rows"
    folder.mkdir()
    write(folder / "train.jsonl", *rows)
    found = opened(folder, "prompts", "train")
    assert found == rows and [type(row.get("answer")) for row in found] == [
        int,
        float,
        str,
        type(None),
    ]
    # A single file too; other kinds keep what they need alone.
    path = write(tmp_path / "one.jsonl", *rows)
    assert sorted(json.dumps(row) for row in every_split(path, "prompts")) == sorted(
        map(json.dumps, rows)
    )
    path = write(tmp_path / "two.jsonl", {"prompt": "p", "response": "r", "source": "s"})
    assert every_split(path, "demonstrations") == [{"prompt": "p", "response": "r", "group": ""}]


def every_split(path, kind):
    """The rows of all splits, those left out that have none."""
    splits = []
    for split in ("train", "validation", "test"):
        with contextlib.suppress(UserError):
            splits += opened(path, kind, split)
    return splits


@pytest.mark.parametrize("kind", ["demonstrations", "prompts"])
def test_one_file_is_split_by_group_where_rows_name_one(tmp_path, kind):
    """The turns of a dialogue have different prompts; dialogues are numbers or texts."""
    rows = [
        {"prompt": f"turn {i}", "response": "r", "group": i // 4 if i % 2 else str(i // 4)}
        for i in range(400)
    ]
    path = write(tmp_path / "rows.jsonl", *rows, {"prompt": "alone", "response": "r"})
    parts = {split: opened(path, kind, split) for split in ("train", "validation", "test")}
    found = [{group_of(row) for row in part} for part in parts.values()]
    assert sum(map(len, found)) == len(set.union(*found)) == 101 and "alone" in set.union(*found)
    assert sum(map(len, parts.values())) == 401 and min(map(len, parts.values())) > 10


@pytest.mark.parametrize("kind", ["comparisons", "prompts"])
@pytest.mark.parametrize("group", [None, "", True, ["b"], math.nan])
def test_a_group_is_a_text_or_a_number(tmp_path, group, kind):
    path = write(tmp_path / "a.jsonl", {"prompt": "p", "ranked": ["a", "b"], "group": group})
    with pytest.raises(
        UserError,
        match=r"a\.jsonl, line 1: the field group is .*; it must be a text that is not empty, or "
        r"a number\.$",
    ):
        opened(path, kind, "train")


def test_the_group_of_a_row():
    """Its own, or else its prompt; the pairs of a ranking and of a prompt in two lines are of
    one.
    """
    assert group_of({"prompt": " p\n"}) == group_of({"prompt": "p", "group": ""}) == "p"
    assert group_of({"prompt": "p", "group": 0}) == group_of({"prompt": "q", "group": "0"}) == "0"


@pytest.mark.parametrize("answer", [None, "", "  ", True, ["b"], math.nan, 10**400])
def test_an_answer_is_a_text_or_a_number(tmp_path, answer):
    path = write(tmp_path / "a.jsonl", {"prompt": "p", "answer": answer})
    with pytest.raises(
        UserError,
        match=r"a\.jsonl, line 1: the field answer is .*; it must be a text that is not empty, or "
        r"a number\.$",
    ):
        opened(path, "prompts", "train")


def test_errors_through_the_task(tmp_path, monkeypatch):
    monkeypatch.setenv("PERL_JAX_CACHE", str(tmp_path / "c"))
    with pytest.raises(
        UserError, match=r"The task jsonl needs --data\.data-dir: a \.jsonl file, or a folder"
    ):
        get_task("jsonl").open("prompts", "train", DataConfig())
    with pytest.raises(UserError, match=r"There is no file or folder .*nowhere"):
        opened(tmp_path / "nowhere", "prompts", "train")
    (tmp_path / "hollow").mkdir()
    with pytest.raises(
        UserError, match=r"hollow holds none of train\.jsonl, validation\.jsonl, test\.jsonl"
    ):
        opened(tmp_path / "hollow", "prompts", "train")
    path = write(tmp_path / "bad.jsonl", {"prompt": "p", "chosen": "a", "rejected": ""})
    with pytest.raises(UserError, match=r"bad\.jsonl, line 1: the field rejected is empty"):
        opened(path, "comparisons", "train")
    assert not [name for name in (tmp_path / "c").iterdir() if "comparisons" in name.name]


# Rankings, margins, ratings.


COMPARISON = KINDS["comparisons"]


def test_a_ranking_gives_every_pair_and_one_weight(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        {"prompt": "p", "ranked": ["best", "good", "bad"], "weight": 1.5},
        {"prompt": "q", "chosen": "c", "rejected": "r"},
    )
    rows = jsonl.read_jsonl(path, COMPARISON)
    assert [(row["chosen"], row["rejected"], row["weight"]) for row in rows] == [
        ("best", "good", 0.5),
        ("best", "bad", 0.5),
        ("good", "bad", 0.5),
        ("c", "r", 1.0),
    ]
    assert rows[3]["margin"] == 0.0 and math.isnan(rows[3]["probability"])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"ranked": ["a"]},
            "line 1: the field ranked must be a list of two or more responses, best first",
        ),
        ({"ranked": "a"}, "line 1: the field ranked must be a list"),
        (
            {"ranked": ["a", "b"], "chosen": "a"},
            "line 1: give ranked, or chosen and rejected, not both",
        ),
        ({"ranked": ["a", 3]}, "line 1: the field rejected is a number; it must be a string"),
        (
            {"chosen": "a", "rejected": "b", "margin": "big"},
            "line 1: the field margin is 'big'; it must be a number that is finite",
        ),
        (
            {"chosen": "a", "rejected": "b", "weight": -1},
            "line 1: the field weight is -1; it must be a number of 0 or more",
        ),
        (
            {"chosen": "a", "rejected": "b", "probability": 2},
            r"line 1: the field probability is 2; it must be a number in \[0, 1\]",
        ),
    ],
)
def test_errors_of_comparisons(tmp_path, row, message):
    with pytest.raises(UserError, match=message):
        jsonl.read_jsonl(write(tmp_path / "a.jsonl", {"prompt": "p", **row}), COMPARISON)


def test_ratings_may_be_any_number(tmp_path):
    path = write(tmp_path / "a.jsonl", {"prompt": "p", "response": "r", "rating": -7.5})
    assert jsonl.read_jsonl(path, KINDS["ratings"])[0]["rating"] == -7.5


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            '{"prompt": "a", "response": "b", "rating": 1e39}',
            "the field rating is 1e.39; float32 holds numbers up to 3.4e.38",
        ),
        ('{"prompt": "a", "response": "b", "rating": -3.5e38}', "float32 holds numbers up to"),
        (
            '{"prompt": "a", "prompt": "c", "response": "b", "rating": 1}',
            "the field prompt is there more than once",
        ),
        (
            '{"prompt": "a", "response": "b", "rating": 1, "source": {"x": 1, "x": 2}}',
            "the field x is there more than once",
        ),
        (
            '{"prompt": "a\\ud800", "response": "b", "rating": 1}',
            "the field prompt has half of a surrogate pair",
        ),
        (
            '{"prompt": "a", "response": "b", "rating": 1, "source": ["c", {"d": "\\udc00"}]}',
            "the field source has half of a surrogate pair",
        ),
        (
            '{"prompt": "a", "response": "b", "rating": 1, "source": {"\\ud800": 1}}',
            "the field source has half of a surrogate pair",
        ),
    ],
)
@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_what_no_batch_or_file_can_hold_is_refused_in_every_split(tmp_path, line, message, split):
    folder = tmp_path / "rows"
    folder.mkdir()
    good = '{"prompt": "a", "response": "b", "rating": 1}\n'
    for name in ("train", "validation", "test"):
        (folder / f"{name}.jsonl").write_text(good + (line if name == split else good))
    with pytest.raises(UserError, match=f"{split}.jsonl, line 2: .*{message}"):
        opened(folder, "ratings", split)


def test_a_row_may_say_its_split(tmp_path):
    path = tmp_path / "rows.jsonl"
    named = [{"prompt": f"{n}", "split": split} for n, split in enumerate(("test", "train") * 4)]
    free = [{"prompt": f"free {n}"} for n in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in named + free))
    config = DataConfig(data_dir=str(path))
    read = {split: list(jsonl.JsonlBuilder.rows("prompts", split, config)) for split in SPLITS}
    for split, rows in read.items():
        own = [row for row in rows if "split" in row]
        assert own == [row for row in named if row["split"] == split]
        # Others stay where a hash puts them, whatever other rows say.
        assert [row for row in rows if "split" not in row] == [
            row for row in free if jsonl.split_of(row["prompt"]) == split
        ]
    path.write_text(json.dumps({"prompt": "p", "split": "dev"}))
    with pytest.raises(
        UserError,
        match="line 1: the field split is 'dev'; it must be train, validation or test",
    ):
        list(jsonl.JsonlBuilder.rows("prompts", "train", config))


def test_finished_is_true_or_false(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "p", "response": "r", "finished": 1}))
    with pytest.raises(
        UserError, match="line 1: the field finished is 1; it must be true or false"
    ):
        jsonl.read_jsonl(path, KINDS["demonstrations"])
