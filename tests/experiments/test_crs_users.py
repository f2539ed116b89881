"""Stated likes, profiles and the weights of training conversations, by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import redial
import users
from documents import Tokenizer, TokenizerConfig
from redial import Case, Movie
from retrieval import BM25Config, Index, QueryConfig, Retriever
from users import Profiles, UserConfig, UserRetriever, chosen, likes

from perl_jax.errors import UserError
from tests.experiments import tiny_redial

MOVIES = {
    "1": Movie("1", "Night Train", "1999", ("horror",)),
    "2": Movie("2", "Dark Cellar", "2001", ("horror", "mystery")),
    "3": Movie("3", "Paper Hearts", "2005", ("romance",)),
}


def turns(*said):
    return redial.turns_of(
        [tiny_redial.message(1 if who == "s" else 2, text) for who, text in said], 1
    )


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ([("s", "I love @1 and @2")], ["1", "2"]),
        ([("s", "I didn't like @1. But @2 was great")], ["2"]),
        ([("s", "I have not seen @1; what about @2?")], ["2"]),
        ([("s", "@1 is good but I hated @2")], ["1"]),
        ([("s", "I liked @1. Actually no, @1 was boring")], []),
        ([("r", "Have you seen @1?"), ("s", "Yes, I loved that one!")], ["1"]),
        ([("r", "Have you seen @1?"), ("s", "No, I don't like those")], []),
        ([("r", "Have you seen @1?"), ("s", "I like @2 better")], ["2"]),
        ([("r", "I love @1")], []),
        ([], []),
    ],
)
def test_stated_likes(said, expected):
    assert likes(turns(*said)) == expected


def test_a_training_seekers_likes_are_the_forms_and_else_what_was_said():
    said = [("s", "I love @1"), ("r", "and @2?"), ("s", "never")]
    names = {"1": "Night Train (1999)", "2": "Dark Cellar (2001)"}
    read = lambda row: redial.parse_dialogue(json.dumps(row), "here")
    assert users.known_likes(read(tiny_redial.row(1, said, names, liked=("2",)))) == ["2"]
    assert users.known_likes(read(tiny_redial.row(1, said, names))) == ["1"]


def test_profiles_and_similarity_by_hand():
    profiles = Profiles([["1", "2"], ["3"], []], MOVIES, genre=0.0)
    weight = math.log(1 + 3 / 2)  # each movie is liked by one of three
    assert profiles.profile(["1", "2", "1"]) == pytest.approx(
        {"1": 1 / math.sqrt(2), "2": 1 / math.sqrt(2)}
    )
    np.testing.assert_allclose(profiles.similarity(["1"]), [1 / math.sqrt(2), 0, 0])
    np.testing.assert_allclose(
        profiles.similarity(["3", "unknown"])[1], weight / math.hypot(weight, math.log(1 + 3 / 1))
    )
    np.testing.assert_array_equal(profiles.similarity([]), [0, 0, 0])


def test_genres_make_seekers_alike_who_share_no_movie():
    profiles = Profiles([["1"], ["3"]], MOVIES, genre=0.5)
    weight, unseen = math.log(1 + 2 / 2), math.log(1 + 2 / 1)
    # @2 is new: its own weight, 0.5 for horror and 0.5 for mystery; the first seeker has 0.5 for
    # horror.
    expected = 0.25 / (math.hypot(weight, 0.5) * math.sqrt(unseen**2 + 0.5))
    np.testing.assert_allclose(profiles.similarity(["2"]), [expected, 0])


def test_chosen_keeps_the_largest():
    np.testing.assert_array_equal(chosen(np.array([0.1, 0.5, 0.0, 0.3]), 2), [0, 0.5, 0, 0.3])
    np.testing.assert_array_equal(chosen(np.array([0.0, 0.5, 0.0, 0.0]), 2), [0, 0.5, 0, 0])
    np.testing.assert_array_equal(chosen(np.array([0.2, 0.1]), 5), [0.2, 0.1])


def made(config):
    names = dict.fromkeys(MOVIES, "x")
    rows = [
        tiny_redial.row(
            1, [("s", "scary night please"), ("r", "@1 and @2")], names, liked=("1", "2")
        ),
        tiny_redial.row(2, [("s", "scary night please"), ("r", "@3")], names, liked=("3",)),
    ]
    dialogues = [redial.parse_dialogue(json.dumps(row), "here") for row in rows]
    tokenizer = Tokenizer(TokenizerConfig(stem=False, mentions="id"), MOVIES)
    documents = Retriever(
        Index([["other"], ["other"], ["scary"]], BM25Config()),
        tokenizer,
        QueryConfig(),
        np.zeros(3),
    )
    return UserRetriever(documents, dialogues, MOVIES, BM25Config(1.2, 0.75), config), documents


CASE = Case("9", 1, turns(("s", "I love @1, something scary?")), ("2",))


@pytest.mark.parametrize("alike", [0.0, 0.5, 1.0])
def test_scores_by_hand(alike):
    system, documents = made(UserConfig(weight=2.0, neighbours=10, genre=0.0, alike=alike))
    each = system.index.scores(["love", "@1", "something", "scary"])
    # The first seeker likes @1 too, the second does not: cosine over the largest is 1 and 0.
    weights = np.array([1.0, 1 - alike])
    np.testing.assert_allclose(system.weights(["1"]), weights)
    paid = weights * each
    np.testing.assert_allclose(
        system.scores(CASE) - documents.scores(CASE), 2.0 * np.array([paid[0], paid[0], paid[1]])
    )


def test_a_seeker_without_likes_yet_is_alike_to_nobody_and_a_weight_of_zero_changes_nothing():
    system, documents = made(UserConfig(alike=1.0, genre=0.0))
    case = Case("9", 1, turns(("s", "scary night please")), ("2",))
    np.testing.assert_array_equal(system.scores(case), documents.scores(case))
    system, documents = made(UserConfig(weight=0.0))
    np.testing.assert_array_equal(system.scores(CASE), documents.scores(CASE))


def test_only_so_many_conversations_pay():
    system, _ = made(UserConfig(weight=1.0, neighbours=1, genre=0.0, alike=0.5))
    gained = system.scores(CASE) - system.documents.scores(CASE)
    assert gained[0] > 0 and gained[1] == gained[0] and gained[2] == 0


def test_settings_out_of_range():
    with pytest.raises(UserError, match=r"alike is 2; it must lie in \[0, 1\]"):
        UserConfig(alike=2)
    with pytest.raises(UserError, match="neighbours is 0"):
        UserConfig(neighbours=0)
