"""Rule rewards against values worked out by hand, and the messages of wrong settings."""

from __future__ import annotations

import numpy as np
import pytest

from perl_jax.data.config import DataConfig
from perl_jax.data.tasks import get_task
from perl_jax.errors import UserError
from perl_jax.rewards.rules import RULES, ExactMatch, Format, Length, Regex, Words


def rewards(rule, *responses, rows=None):
    values = rule([""] * len(responses), responses, [{}] * len(responses) if rows is None else rows)
    assert values.dtype == np.float64
    assert values.shape == (len(responses),)
    return values.tolist()


def test_length_in_words():
    rule = Length(minimum=2, maximum=4, scale=4)
    # 0, 1, 2, 4, 5, 7, 8 and 9 words: excess 2, 1, 0, 0, 1, 3, 4, 5 over scale 4, never below -1.
    texts = ["", "a", " a\n\tb ", "a b c d", "a b c d e", "a " * 7, "a " * 8, "a " * 9]
    assert rewards(rule, *texts) == [-0.5, -0.25, 0, 0, -0.25, -0.75, -1, -1]
    assert not np.signbit(rule([""], ["a b"], [{}])).any()


def test_length_in_characters_counts_code_points():
    rule = Length(maximum=3, unit="characters", scale=10)
    assert rewards(rule, "", "日本語", "日本語!", "e\u0301a ", "x" * 1_000_000) == [
        0,
        0,
        -0.1,
        -0.1,
        -1,
    ]


def test_length_with_one_bound():
    assert rewards(Length(minimum=1, scale=2), "", "word " * 10_000) == [-0.5, 0]
    assert rewards(Length(maximum=0), "", "one") == [0, -0.05]


def test_format():
    texts = [
        '{"a": 1}',
        " [1, 2]\n",
        "42",
        '"é"',
        "null",
        "",
        "{",
        '{"a": 1} done',
        "```json\n{}\n```",
        "{'a': 1}",
    ]
    assert rewards(Format(), *texts) == [1, 1, 1, 1, 1, 0, 0, 0, 0, 0]
    assert rewards(Format(), "NaN", "[Infinity]", '{"a": -Infinity}') == [0, 0, 0]
    assert rewards(Format(), "9" * 10_000, "[" * 100_000, '"' + "x" * 1_000_000 + '"') == [1, 0, 1]


def test_format_with_keys():
    texts = ['{"a": null, "b": [], "c": 1}', '{"a": 1}', '["a", "b"]', '"ab"', '[{"a": 1, "b": 2}]']
    assert rewards(Format(keys=("a", "b")), *texts) == [1, 0, 0, 0, 0]


def test_regex():
    assert rewards(Regex(r"\d+ kg"), "12 kg", "about 12 kg.", "kg", "") == [1, 1, 0, 0]
    assert rewards(Regex(r"\d+ kg", mode="fullmatch"), "12 kg", "about 12 kg.", "12 kg\n") == [
        1,
        0,
        0,
    ]
    assert rewards(Regex(r"(?i)ÉTÉ"), "été", "ete", "x" * 1_000_000) == [1, 0, 0]
    assert rewards(Regex(r"x*"), "") == [1]  # an empty match is a match


def test_exact_match():
    rows = [
        {"answer": "Saint  Malo "},
        {"answer": "straße"},
        {"answer": 42},
        {"answer": 0.5},
        {"answer": "b"},
        {"answer": "b"},
    ]
    texts = ["\tsaint\nMALO", "STRASSE", "42", "0.5", "", "a"]
    assert rewards(ExactMatch(), *texts, rows=rows) == [1, 1, 1, 1, 0, 0]
    assert rewards(ExactMatch(strict=True), *texts, rows=rows) == [0, 0, 1, 1, 0, 0]
    assert rewards(ExactMatch(field="gold", strict=True), "a", rows=[{"gold": "a"}]) == [1]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "6 x 7?", "id": 1},
            "Row 1 ('6 x 7?') has no field 'answer' (exact_match.field) to compare with; it has "
            "prompt, id.",
        ),
        (
            {},
            "Row 1 has no field 'answer' (exact_match.field) to compare with; it has no field at "
            "all.",
        ),
        (
            {"answer": None},
            "Row 1: the field answer is None; exact_match needs a text that is not empty, or a "
            "number.",
        ),
        (
            {"answer": True},
            "Row 1: the field answer is True; exact_match needs a text that is not empty, or a "
            "number.",
        ),
        (
            {"answer": ""},
            "Row 1: the field answer is ''; exact_match needs a text that is not empty, or a "
            "number.",
        ),
        (
            {"prompt": "q" * 200, "answer": " "},
            f"Row 1 ({'q' * 80!r}): the field answer is ' '; exact_match needs a text that is not "
            "empty, or a number.",
        ),
    ],
)
def test_exact_match_names_the_row(row, message):
    with pytest.raises(UserError) as caught:
        rewards(ExactMatch(), "a", "", rows=[{"answer": "a"}, row])
    assert str(caught.value) == message
    # All rows at once, before there is a response.
    with pytest.raises(UserError) as caught:
        ExactMatch().check_rows([{"answer": "a"}, row])
    assert str(caught.value) == message


def test_exact_match_reads_any_column_of_ones_own_rows(tmp_path):
    """An empty response was paid 1 where prompts had no answer."""
    (tmp_path / "train.jsonl").write_text('{"prompt": "6 x 7?", "ground_truth": 42}\n')
    rows = get_task("jsonl").open("prompts", "train", DataConfig(data_dir=str(tmp_path)))
    assert rewards(ExactMatch("ground_truth"), "", "42", rows=[rows[0], rows[0]]) == [0, 1]
    with pytest.raises(
        UserError,
        match=r"^Row 0 \('6 x 7\?'\) has no field 'answer' .* it has prompt, ground_truth\.$",
    ):
        rewards(ExactMatch(), "", rows=[rows[0]])


def test_words():
    rule = Words(("please", "Thank you", "thank"), most=4)
    texts = [
        "Please, PLEASE: pleased",
        "thank  YOU thank",
        "",
        "displease please_ 2please",
        "please " * 9,
    ]
    # Two; a phrase and a word; none; none that is whole; nine, capped at four.
    assert rewards(rule, *texts) == [0.5, 0.5, 0, 0, 1]
    assert rewards(
        Words(("Straße", "c++", "日本")), "die STRASSE", "C++!", "日本", "日本語", "c"
    ) == [1, 1, 1, 0, 0]
    assert rewards(
        Words(("you", "thank you", "thank"), most=4), "thank you", "you thank", "thank you you"
    ) == [0.25, 0.5, 0.5]
    assert rewards(Words(("a.c",), most=2), "abc", "a.c") == [0, 0.5]
    assert rewards(Words(("x",), most=1_000_000), "x " * 500_000) == [0.5]


@pytest.mark.parametrize(
    "rule", [Length(maximum=1), Format(), Regex("a"), ExactMatch(), Words(("a",))]
)
def test_an_empty_batch_is_an_empty_column(rule):
    assert rewards(rule) == []


def test_the_table_names_every_rule():
    assert {
        "length": Length,
        "format": Format,
        "regex": Regex,
        "exact_match": ExactMatch,
        "words": Words,
    } == RULES


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (Length, "length has neither minimum nor maximum"),
        (
            lambda: Length(minimum=-1),
            "length.minimum is -1; it must be a whole number of at least 0.",
        ),
        (
            lambda: Length(minimum=5, maximum=4),
            "length.maximum is 4; it must be a whole number of at least 5.",
        ),
        (lambda: Length(maximum=2.5), "length.maximum is 2.5; it must be a whole number"),
        (lambda: Length(maximum=True), "length.maximum is True; it must be a whole number"),
        (
            lambda: Length(maximum=1, unit="tokens"),
            "length.unit is 'tokens'; it must be one of words, characters.",
        ),
        (
            lambda: Length(maximum=1, scale=0),
            "length.scale is 0; it must be a finite number greater than 0.",
        ),
        (lambda: Format(keys="ab"), "format.keys is 'ab'; it must be a list of texts"),
        (lambda: Format(keys=("a", 1)), "format.keys is ('a', 1); it must be a list of texts"),
        (
            lambda: Regex("(a"),
            "regex.pattern is '(a', which is not a regular expression: missing ), unterminated "
            "subpattern",
        ),
        (
            lambda: Regex("a{99999999999}"),
            "which is not a regular expression: the repetition number is too large",
        ),
        (lambda: Regex(""), "regex.pattern is ''; it must be a text that is not empty."),
        (
            lambda: Regex("a", mode="match"),
            "regex.mode is 'match'; it must be one of search, fullmatch.",
        ),
        (lambda: ExactMatch(field=3), "exact_match.field is 3; it must be a text"),
        (
            lambda: ExactMatch(strict="yes"),
            "exact_match.strict is 'yes'; it must be true or false.",
        ),
        (lambda: Words(()), "words.words is empty; it must be a list of at least one word."),
        (lambda: Words("please"), "words.words is 'please'; it must be a list of texts"),
        (lambda: Words(("a", " ")), "words.words is ('a', ' '); it must be a list of texts"),
        (
            lambda: Words(("a",), most=0),
            "words.most is 0; it must be a whole number of at least 1.",
        ),
    ],
)
def test_wrong_settings(build, message):
    with pytest.raises(UserError) as caught:
        build()
    assert message in str(caught.value)
