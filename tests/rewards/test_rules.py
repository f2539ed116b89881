"""Rule rewards against values worked out by hand, and the messages of wrong settings."""

from __future__ import annotations

import functools
import re
import time
import warnings
from decimal import Decimal

import numpy as np
import pytest

from perl_jax.data.config import DataConfig
from perl_jax.data.tasks import get_task
from perl_jax.errors import UserError
from perl_jax.rewards import patterns
from perl_jax.rewards.answers import last_boxed, last_number
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


def exact(response, answer, **settings):
    return rewards(ExactMatch(**settings), response, rows=[{"answer": answer}]) == [1]


def test_exact_match_writes_variants_of_characters_alike():
    assert exact("\uff34\uff4f\uff4b\uff59\uff4f", "tokyo")  # full width
    assert exact("\ufb01ne", "FINE")  # a ligature
    assert exact("e\u0301te\u0301", "\u00c9T\u00c9")  # accents of their own, and capitals
    assert exact("x\u00a0y", "x y")
    assert exact("\u0130", "\u0130".lower())  # folded, it has a character more
    assert not exact("\ufb01ne", "fine", strict=True)
    assert not exact("\ufb01ne", "Fine", keep_case=True)
    assert exact("\ufb01ne  wine", "fine wine", keep_case=True)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1,234.50", "1234.5"),
        ("so 3 + 4 = 7.", "7"),
        ("It costs $1,234.50.", "1234.5"),
        ("-$3 in all", "-3"),
        ("5-3", "3"),
        ("from 5 to -3", "-3"),
        ("minus \u22127", "-7"),
        ("\uff11\uff12\uff0e\uff15", "12.5"),
        ("1,2,3", "3"),
        ("12,34", "34"),
        ("1,234,567", "1234567"),
        ("1,2345", "2345"),
        (".5", "0.5"),
        ("2e-3 or so", "0.002"),
        ("2e3x", "2"),
        ("version v2", None),
        ("8 of 1.2.3", "1.2"),
        ("10%", "10"),
        ("0.1000000000000000000000001", "0.1000000000000000000000001"),
        ("1e99999999", "1"),
        ("", None),
        ("-", None),
    ],
)
def test_the_last_number(text, number):
    assert last_number(text) == (None if number is None else Decimal(number))


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"so \boxed{42}.", "42"),
        (r"\boxed{1} and \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed {a}", "a"),
        (r"\boxed{a \boxed{b}}", "b"),
        (r"\boxed{1} and then \boxed{2", "1"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"} \boxed{x} {", "x"),
        (r"\boxed{}", ""),
        (r"\fbox{1} boxed{2} \boxed 3", None),
        ("", None),
    ],
)
def test_the_last_box(text, content):
    assert last_boxed(text) == content


def test_searches_are_linear_in_the_text():
    begun = time.monotonic()
    size = 60_000
    for text in (
        "1" * size,
        "1," * size,
        "1,111" * size,
        r"\boxed{" * size,
        "{" * size + "}" * size,
    ):
        last_number(text)
        last_boxed(text)
        exact(text, "1", extract="last_number")
        Regex("a+b").__call__([""], [text], [{}])
    assert time.monotonic() - begun < 60


def test_exact_match_finds_the_answer():
    assert exact("I think 40, no, 1,234.50!", 1234.5, extract="last_number")
    assert exact("42", "6 * 7 = 42\n#### 42.0", extract="last_number")
    assert not exact("no idea", "42", extract="last_number")
    assert exact(r"so \boxed{ \frac{1}{2} }", r"\frac{1}{2}", extract="boxed")
    assert exact(r"so \boxed{1,000}", "1000", extract="boxed")
    assert exact(r"so \boxed{B}", r"as shown, \boxed{b}", extract="boxed")
    assert not exact(r"so \boxed{B}", "b", extract="boxed", keep_case=True)
    assert not exact(r"so \boxed{1,000}", "1000", extract="boxed", strict=True)
    assert exact(r"so \boxed{1,000}", "1,000", extract="boxed", strict=True)
    assert not exact("1000", "1000", extract="boxed")  # there is no box
    assert not exact(r"\boxed{ }", " b", extract="boxed")
    assert exact("#### 7\n#### 8", "work\n#### 8", pattern=r"#### (.+)")
    assert exact("answer: Yes.", "yes", pattern=r"(?i)yes|no")
    assert not exact("####", "x", pattern=r"####(.*)")  # what is found is empty
    assert exact("x=1.50;", 1.5, pattern=r"x=(?:(\S+);)")


@pytest.mark.parametrize("answer", ["none", r"\boxed{}", "v2"])
def test_an_answer_without_a_number_is_told_before_training(answer):
    with pytest.raises(UserError) as caught:
        ExactMatch(extract="last_number").check_rows([{"answer": 1}, {"answer": answer}])
    assert str(caught.value) == (
        f"Row 1: the field answer is {answer!r}, in which there is no number (exact_match.extract "
        "is last_number)."
    )


@pytest.mark.parametrize(
    ("rule", "pattern"),
    [
        (Regex, "(a+)+$"),
        (Regex, "(a|aa)+$"),
        (functools.partial(Regex, mode="fullmatch"), "(a|aa)+$"),
        (lambda pattern: ExactMatch(pattern=pattern), "(a|aa)+$"),
    ],
)
def test_a_pattern_that_never_ends_is_one_sentence(monkeypatch, rule, pattern):
    monkeypatch.setattr(patterns, "SECONDS", 0.2)
    text = "a" * 5000 + "!"
    begun = time.monotonic()
    with pytest.raises(UserError) as caught:
        rewards(rule(pattern), "ok", text, rows=[{"answer": "x"}] * 2)
    assert time.monotonic() - begun < 60  # a busy machine
    field = "regex.pattern" if isinstance(rule(pattern), Regex) else "exact_match.pattern"
    assert str(caught.value) == (
        f"{field} {pattern!r} takes longer than 0.2 s for the response at index 1, {text[:80]!r}; "
        "nested repetitions such as (a+)+ do so, give a simpler pattern."
    )


def test_many_slow_matches_end_too(monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 0.2)
    with pytest.raises(UserError, match="takes longer than"):
        patterns.last_match("f", "a", "a" * 3_000_000, 0)


def test_patterns_mean_what_they_mean_in_pythons_re():
    texts = ["", "aB", "ab\nab", "été É", "12 kg", "a]b", "[[x]]", "\u2028", "x" * 50, "ſ"]
    for pattern in (
        *(r"^ab$", r"(?m)^ab$", r"(?s)a.b", r"(?i)É", r"\bkg\b", r"[[a]", r"\d+(?= kg)", r"\Z"),
        *(
            r"(?P<x>.)(?P=x)",
            r"a|",
            r"(?i)s",
            r"[^\W\d]+",
            r"x{2,3}?",
            r"(?a)\w{3}",
            r"a||b",
            r"\s",
        ),
    ):
        with warnings.catch_warnings(action="ignore"):
            compiled = re.compile(pattern)
        for text in texts:
            for whole, match in ((False, compiled.search), (True, compiled.fullmatch)):
                found = patterns.matches("f", pattern, text, 0, whole)
                assert found == (match(text) is not None), (pattern, text, whole)


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
        (
            lambda: ExactMatch(extract="number"),
            "exact_match.extract is 'number'; it must be one of last_number, boxed.",
        ),
        (lambda: ExactMatch(pattern="(a"), "exact_match.pattern is '(a', which is not a regular"),
        (
            lambda: ExactMatch(pattern="(a)(b)"),
            "exact_match.pattern '(a)(b)' has 2 groups; give one group around the answer, and "
            "write others as (?:...).",
        ),
        (
            lambda: ExactMatch(extract="boxed", pattern="a"),
            "exact_match has extract and pattern; give one of them.",
        ),
        (
            lambda: ExactMatch(extract="last_number", strict=True),
            "exact_match with extract last_number compares numbers; leave strict out.",
        ),
        (
            lambda: ExactMatch(extract="last_number", keep_case=True),
            "exact_match with extract last_number compares numbers; leave keep_case out.",
        ),
        (
            lambda: ExactMatch(strict=True, keep_case=True),
            "exact_match.strict compares case too; leave keep_case out.",
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
