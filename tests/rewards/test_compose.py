"""Terms from JSON, their columns and their sum, and what is said of a list that is wrong."""

from __future__ import annotations

import json
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

from perl_jax.cli.help import description
from perl_jax.errors import UserError
from perl_jax.rewards.compose import KINDS, Composite, Term, kinds_text, read_terms, term_fields
from perl_jax.rewards.config import RewardOptions
from perl_jax.rewards.function import FunctionReward
from perl_jax.rewards.judge import Judge
from perl_jax.rewards.models import reward
from perl_jax.rewards.rules import RULES, ExactMatch, Format, Length, Words

LENGTH = {"kind": "length", "maximum": 1}
PAGE = pathlib.Path(__file__).parents[2] / "docs" / "rewards.md"


def test_terms_of_a_text_and_of_a_file(tmp_path):
    (tmp_path / "mine.py").write_text("def score(p, r): return [0] * len(r)\n")
    function = f"{tmp_path}/mine.py:score"
    values = [
        {"kind": "length", "weight": 0.2, "maximum": 50, "unit": "characters"},
        {"kind": "words", "name": "manners", "words": ["please", "thanks"], "weight": -1},
        {"kind": "function", "function": function},
        {"kind": "judge", "url": "http://localhost/v1", "model": "m", "highest": 5},
    ]
    expected = (
        Term("length", 0.2, Length(maximum=50, unit="characters")),
        Term("manners", -1, Words(("please", "thanks"))),
        Term("function", 1.0, FunctionReward(function)),
        Term("judge", 1.0, Judge("http://localhost/v1", "m", highest=5)),
    )
    assert read_terms("\n " + json.dumps(values)) == expected
    assert read_terms("\n" + json.dumps(values[0])) == expected[:1]
    (tmp_path / "terms.json").write_text(json.dumps(values))
    assert (
        read_terms(tmp_path / "terms.json") == read_terms(str(tmp_path / "terms.json")) == expected
    )


@pytest.mark.parametrize(
    "wrong",
    [
        {"url": "http://localhost/v1?key=sk-1"},
        {"url": "http://me:sk-1@localhost/v1"},
        {"api_key_variable": "sk-1"},
        {"api_key": "sk-1"},
    ],
)
def test_a_key_in_the_terms_is_refused_before_a_run_could_write_it(wrong):
    terms = json.dumps({"kind": "judge", "url": "http://localhost/v1", "model": "m", **wrong})
    with pytest.raises(UserError) as caught:
        RewardOptions(model="m", terms=terms)
    assert str(caught.value).startswith("Reward term 1 (judge)")
    assert "sk-1" not in str(caught.value)


def test_the_documentation_and_the_help_list_every_field_of_every_kind():
    page = PAGE.read_text("utf-8")
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| ([^|]+) \|$", page, re.M)
    documented = {kind: re.findall(r"`(\w+)`", fields) for kind, fields in rows}
    known = {kind: [field.name for field in term_fields(cls)] for kind, cls in KINDS.items()}
    assert documented == known
    for command in ("rl", "evaluate", "best-of"):
        _, _, text = description(command, "").partition(
            "Kinds of --terms and their fields, besides "
        )
        common, _, kinds = text.partition("\n")
        assert common.split(", ") == ["weight", "name", "special_tokens"]
        assert kinds.startswith(kinds_text())
    shown: dict[str, list[str]] = {}
    for line in kinds_text().splitlines():
        if line[2] != " ":
            kind, line = line.split(maxsplit=1)
            shown[kind] = []
        shown[kind] += [part.partition("=")[0].strip() for part in line.split(",") if part.strip()]
    assert shown == known
    assert "terms" not in description("score", "")


def test_special_tokens_reach_the_terms_that_ask_for_them():
    terms = [
        Term("plain", 1.0, Length(minimum=9, scale=1)),
        *read_terms('{"kind": "regex", "pattern": "<think>", "special_tokens": true}'),
        reward(lambda prompts, responses: [len(text) for text in responses], special_tokens=True),
    ]
    composite = Composite(terms)
    assert composite.special_tokens
    assert not Composite(terms[:1]).special_tokens
    columns = composite(["p"], ["a"], [{}], ["<think>a"])
    assert {name: column.tolist() for name, column in columns.items()} == {
        "plain": [-1],
        "regex": [1],
        "<lambda>": [8],
    }
    with pytest.raises(ValueError, match="a term needs the responses with their special tokens"):
        composite(["p"], ["a"], [{}])
    with pytest.raises(UserError, match=r"special_tokens is 1; it must be true or false\.$"):
        read_terms('{"kind": "format", "special_tokens": 1}')


def test_the_table_of_kinds():
    assert dict(KINDS) == {**RULES, "function": FunctionReward, "judge": Judge}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], "The reward terms must be a JSON object, or a list of at least one."),
        ({}, "Reward term 1 has no kind; it must be one of length,"),
        (
            ["length"],
            "Reward term 1 is 'length'; it must be an object with a kind, one of length, format, "
            "regex, exact_match, words, function, judge.",
        ),
        (
            [LENGTH, {"weight": 1}],
            "Reward term 2 has no kind; it must be one of length, format, regex, exact_match, "
            "words, function, judge.",
        ),
        ([{"kind": "bleu"}], "Reward term 1: kind is 'bleu'; it must be one of length, format,"),
        ([{"kind": ["length"]}], "Reward term 1: kind is ['length']; it must be one of"),
        (
            [{**LENGTH, "maxmum": 2, "x": 1}],
            "Reward term 1 (length) has no field maxmum, x; it has minimum, maximum, unit, scale, "
            "besides kind, weight, name, special_tokens.",
        ),
        (
            [{"kind": "function", "function": "json:loads", "worker": 1}],
            "Reward term 1 (function) has no field worker; it has function, timeout_seconds,",
        ),
        (
            [{"kind": "judge", "mode": "number"}],
            "Reward term 1 (judge) needs the field url, model; it has url, model, template,",
        ),
        (
            [{**LENGTH, "maximum": "5"}],
            "Reward term 1 (length): length.maximum is '5'; it must be a whole number of at least "
            "0.",
        ),
        (
            [{**LENGTH, "weight": float("nan")}],
            "Reward term 1 (length): weight is nan; it must be a finite number.",
        ),
        (
            [{**LENGTH, "weight": True}],
            "Reward term 1 (length): weight is True; it must be a finite number.",
        ),
        ([{**LENGTH, "weight": 10**400}], "Reward term 1 (length): weight is 1000"),
        (
            [{**LENGTH, "name": ""}],
            "Reward term 1 (length): name is ''; it must be a text that is not empty.",
        ),
        (
            [LENGTH, {"kind": "format"}, LENGTH],
            "Two reward terms are called length; give each a name of its own by the field name.",
        ),
        ([LENGTH, {"kind": "format", "name": "length"}], "Two reward terms are called length;"),
    ],
)
def test_wrong_terms(values, expected):
    with pytest.raises(UserError) as caught:
        read_terms(json.dumps(values))
    assert str(caught.value).startswith(expected)


def test_sources_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"^The reward terms: not valid JSON, line 2, column 1: "):
        read_terms('[{"kind":\n')
    with pytest.raises(UserError, match=r"^The reward terms: not valid JSON \("):
        read_terms("[" * 100_000)
    with pytest.raises(
        UserError,
        match=r"^The file of reward terms .*gone\.json cannot be read: there is no such file "
        r"or folder; check the path\.$",
    ):
        read_terms(tmp_path / "gone.json")
    with pytest.raises(UserError, match="cannot be read: it is a folder"):
        read_terms(tmp_path)
    path = tmp_path / "terms.json"
    path.write_text('"length"')
    with pytest.raises(
        UserError,
        match=r"^The file of reward terms .*terms\.json must be a JSON object, or a list of at "
        r"least one\.$",
    ):
        read_terms(path)
    path.write_bytes(b"[\xff]")
    with pytest.raises(UserError, match=r"terms\.json is not UTF-8 text \(byte 1\)\.$"):
        read_terms(path)


def constant(*values):
    return lambda prompts, responses, rows: np.array(values)


def test_columns_and_their_weighted_sum():
    terms = [
        Term("length", 0.5, Length(maximum=1, scale=4)),
        Term("json", 2, Format()),
        Term("given", -1.0, constant(1, 2, 3)),
    ]
    composite = Composite(terms)
    columns = composite(["p"] * 3, ["1", "a b c", "[]"], [{}] * 3)
    assert {name: column.tolist() for name, column in columns.items()} == {
        "length": [0, -0.5, 0],
        "json": [1, 0, 1],
        "given": [1, 2, 3],
    }
    assert {column.dtype for column in columns.values()} == {np.dtype(np.float64)}
    # 0.5 * length + 2 * json - given
    total = composite.total(columns)
    assert total.dtype == np.float64
    assert total.tolist() == [1, -2.25, -1]


def test_rows_are_checked_before_there_are_responses():
    composite = Composite(
        [
            Term("length", 1, Length(maximum=1)),
            Term("exact", 1, ExactMatch()),
            Term("gold", 1, ExactMatch("gold")),
        ]
    )
    composite.check_rows([{"prompt": "p", "answer": "a", "gold": 0}] * 2)
    with pytest.raises(
        UserError, match=r"^The reward term gold: Row 1 \('q'\) has no field 'gold' "
    ):
        composite.check_rows(
            [{"prompt": "p", "answer": "a", "gold": 0}, {"prompt": "q", "answer": "a"}]
        )


def test_an_empty_batch_asks_nothing():
    def refuse(prompts, responses, rows):
        raise AssertionError("called")

    composite = Composite([Term("a", 1, refuse), Term("b", 1, refuse)])
    columns = composite([], [], [])
    assert {name: (column.shape, column.dtype.name) for name, column in columns.items()} == {
        "a": ((0,), "float64"),
        "b": ((0,), "float64"),
    }
    assert composite.total(columns).shape == (0,)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (
            (1.0,),
            r"The reward term t returned an array of shape \(1,\); it must be \(2,\), one number a "
            r"response\.",
        ),
        (
            ([1.0], [2.0]),
            r"The reward term t returned an array of shape \(2, 1\); it must be \(2,\)",
        ),
        (
            (1.0, np.nan),
            r"The reward term t returned nan at index 1; every reward must be finite\.",
        ),
        (
            (-np.inf, np.nan),
            r"The reward term t returned -inf at index 0; every reward must be finite\.",
        ),
    ],
)
def test_columns_are_checked(values, expected):
    composite = Composite([Term("t", 0.0, constant(*values))])
    with pytest.raises(UserError, match=expected):
        composite(["p", "p"], ["a", "b"], [{}, {}])
    with pytest.raises(UserError, match=expected):
        Composite([Term("s", 1, constant()), *composite.terms]).total(
            {"s": np.zeros(2), "t": np.array(values)}
        )


def test_wrong_calls():
    composite = Composite([Term("t", 1, constant(1.0))])
    with pytest.raises(
        ValueError,
        match="prompts, responses and rows have 1, 1, 2 items; they must be equally many",
    ):
        composite(["p"], ["r"], [{}, {}])
    with pytest.raises(ValueError, match="the columns are t, u; they must be those of the terms t"):
        composite.total({"t": np.zeros(1), "u": np.zeros(1)})
    with pytest.raises(UserError, match="There are no reward terms; give at least one"):
        Composite([])
    with pytest.raises(UserError, match="Two reward terms are called t"):
        Composite([Term("t", 1, constant(1.0)), Term("t", 2, constant(1.0))])


def test_the_context_starts_and_ends_what_the_terms_need(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("def score(p, r): return [len(x) for x in r]\n")
    function = {"kind": "function", "function": f"{tmp_path}/mine.py:score", "weight": 2}
    composite = Composite(read_terms(json.dumps([LENGTH, function])))
    worker = composite.terms[1].reward.worker
    with composite:
        assert worker.process.poll() is None
        columns = composite(["p"], ["one word"], [{}])
        assert composite.total(columns).tolist() == [16 - 0.05]
    assert worker.process is None
    # The function has started when the judge's key turns out to be missing.
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    judge = {
        "kind": "judge",
        "url": "http://localhost/v1",
        "model": "m",
        "api_key_variable": "JUDGE_KEY",
    }
    composite = Composite(read_terms(json.dumps([function, judge])))
    with pytest.raises(UserError, match="JUDGE_KEY"), composite:
        pass
    assert composite.terms[0].reward.worker.process is None


def test_jax_is_not_needed():
    code = "import sys, perl_jax.rewards.compose; print('jax' in sys.modules)"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
        == "False\n"
    )
