"""Made-up conversations: which movies get them, what they say, and files of them."""

from __future__ import annotations

import json
import random

import language_model
import numpy as np
import pytest
import redial
import systems
from augment import (
    AugmentConfig,
    Linker,
    cold_movies,
    neighbours_of,
    read_conversations,
    template_conversation,
    template_conversations,
    write_conversations,
)
from documents import DocumentConfig, Tokenizer, TokenizerConfig, documents_of
from redial import Movie, Turn
from texts import (
    heuristic_query,
    parsed,
    pointed,
    query_prompt,
    rendered,
    writer_example,
    writer_prompt,
)

from perl_jax.errors import UserError
from tests.experiments import tiny_redial

MOVIES = redial.catalogue(
    {
        "10": Movie(
            "10",
            "Night Train",
            "1999",
            ("horror",),
            ("Ada Moss",),
            ("Bo Lind",),
            "A haunted sleeper.",
        ),
        "11": Movie(
            "11",
            "Dark Cellar",
            "2001",
            ("horror", "mystery"),
            ("Ada Moss",),
            ("Cy Orr",),
            "Doors close.",
        ),
        "20": Movie(
            "20", "Paper Hearts", "2005", ("romance",), ("Di Paz",), ("Ed Quill",), "Letters cross."
        ),
        "30": Movie(
            "30", "Iron Orbit", "2015", ("sci-fi",), ("Gil Sand",), ("Bo Lind",), "A lost station."
        ),
        "31": Movie("31", "Untold"),
    },
    [],
)
MENTIONS = np.array([0, 3, 5, 1, 0])


def test_cold_movies_are_those_below():
    assert [movie.id for movie in cold_movies(MOVIES, MENTIONS, 1)] == ["10", "31"]
    assert [movie.id for movie in cold_movies(MOVIES, MENTIONS, 2)] == ["10", "30", "31"]


def test_neighbours_share_metadata_and_are_known_from_training():
    found = neighbours_of(MOVIES, [MOVIES["10"], MOVIES["31"]], MENTIONS)
    assert found == {
        "10": ["11", "30"],
        "31": [],
    }  # genre and director; then an actor; of 31 nothing is known


def test_template_conversations_are_the_same_again_and_name_only_what_is_known():
    config = AugmentConfig(below=1, copies=3)
    first, again = (
        template_conversations(MOVIES, MENTIONS, config),
        template_conversations(MOVIES, MENTIONS, config),
    )
    assert first == again and [p.movie for p in first] == ["10"] * 3 + ["31"] * 3
    assert first != template_conversations(
        MOVIES, MENTIONS, AugmentConfig(below=1, copies=3, seed=1)
    )
    # A movie's conversations do not depend on which others are cold.
    wider = template_conversations(MOVIES, MENTIONS, AugmentConfig(below=9, copies=3))
    assert [p for p in wider if p.movie == "10"] == first[:3]
    for passage in first:
        *before, last = passage.turns
        assert not last.seeker and last.movies == (passage.movie,) and passage.at == len(before)
        assert all(passage.movie not in turn.movies for turn in before)
    text = " ".join(turn.text for passage in first[:3] for turn in passage.turns)
    assert (
        "horror" in text
        and ("Bo Lind" in text or "Ada Moss" in text)
        and ("@11" in text or "@30" in text)
    )


def test_a_movie_of_which_nothing_is_known_gets_a_plain_conversation():
    turns = template_conversation(MOVIES["31"], [], random.Random(0))
    assert len(turns) == 2 and "good" in turns[0].text and turns[1].movies == ("31",)


def test_made_up_conversations_make_a_cold_movie_findable(tmp_path):
    found = redial.read_redial(str(tiny_redial.small(tmp_path)))
    position = {movie: i for i, movie in enumerate(found.movies)}
    mentions = systems.mention_counts(found.train, position)
    assert mentions[position["30"]] == 0
    augmented = template_conversations(found.movies, mentions, AugmentConfig(below=1, copies=4))
    tokenizer = Tokenizer(TokenizerConfig(), found.movies)
    make = lambda *fields: documents_of(
        found.movies, DocumentConfig(fields), tokenizer, found.train, augmented
    )[position["30"]]
    assert make("conversations") == []
    assert "@10" in make(
        "conversations", "augmented"
    )  # its neighbour by an actor, which a seeker may name


def test_titles_become_mentions_and_back():
    linker = Linker(MOVIES)
    assert (
        linker.unlinked("I like @10, @31 and @999")
        == "I like Night Train (1999), Untold and a movie"
    )
    assert (
        linker.linked("Have you seen night train (1999)? or Dark Cellar (2001)")
        == "Have you seen @10 or @11"
    )
    assert (
        linker.linked("Night Train and the Untold story") == "Night Train and the Untold story"
    )  # no year; one word
    for text in ("I like @10 and @20", "@11"):
        assert linker.linked(linker.unlinked(text)) == text


def test_conversations_as_text_for_a_model():
    linker = Linker(MOVIES)
    turns = (Turn(True, "I like @10  a lot", ("10",)), Turn(False, "Try @11", ("11",)))
    text = rendered(turns, linker)
    assert text == "seeker: I like Night Train (1999) a lot\nrecommender: Try Dark Cellar (2001)\n"
    assert parsed(text + "nonsense\nseeker:\n", linker) == (
        Turn(True, "I like @10 a lot", ("10",)),
        turns[1],
    )
    prompt = writer_prompt(MOVIES["11"], ["10", "20", "30"], linker)
    assert prompt == (
        "movie: Dark Cellar (2001)\ngenre: horror, mystery\nwith: Cy Orr\nlike: Night Train "
        "(1999), Paper Hearts (2005)\nconversation:\n"
    )
    assert writer_prompt(MOVIES["31"], [], linker) == "movie: Untold\nconversation:\n"
    passage = template_conversations(MOVIES, MENTIONS, AugmentConfig(below=1, copies=1))[0]
    prompt, response = writer_example(passage, MOVIES, linker)
    assert (
        prompt.startswith("movie: Night Train (1999)\n")
        and response.endswith("Night Train (1999).\n")
    ) or "Night Train (1999)?" in response


def test_a_language_models_text_becomes_a_passage_that_ends_in_the_recommendation():
    linker = Linker(MOVIES)
    made = language_model.as_passage(
        "10",
        "seeker: I like Dark Cellar (2001)\nrecommender: Night Train (1999) is scary\n",
        linker,
        0,
    )
    assert [turn.text for turn in made.turns] == ["I like @11", "@10 is scary"] and made.at == 1
    without = language_model.as_passage("10", "seeker: hi\nand so on", linker, 0)
    assert [turn.text for turn in without.turns] == [
        "hi",
        "You should watch @10.",
    ] and without.turns[-1].movies == ("10",)
    assert language_model.as_passage("10", "once upon a time", linker, 0) is None


def test_each_copy_of_a_prompt_names_other_neighbours():
    rows = language_model.written_prompts(
        [MOVIES["20"]], {"20": ["10", "11", "30"]}, Linker(MOVIES), copies=2
    )
    named = [row["prompt"].partition("like: ")[2].partition("\n")[0] for row in rows]
    assert named == [
        "Night Train (1999), Dark Cellar (2001)",
        "Iron Orbit (2015), Night Train (1999)",
    ]
    assert [row["answer"] for row in rows] == ["20", "20"]
    assert (
        "like:"
        not in language_model.written_prompts([MOVIES["31"]], {"31": []}, Linker(MOVIES), copies=1)[
            0
        ]["prompt"]
    )


def test_queries_without_a_model():
    linker, genres = Linker(MOVIES), frozenset({"horror", "romance"})
    case = redial.Case(
        "1",
        3,
        (
            Turn(True, "I love @10 and @11. Any horror?", ("10", "11")),
            Turn(False, "What of @20?", ("20",)),
            Turn(True, "Not that", ()),
        ),
        ("30",),
    )
    assert case.introduced == ("10", "11", "20")
    assert heuristic_query(case, genres) == " #1 #2 horror"
    assert query_prompt(case, linker) == (
        "seeker: I love #1 Night Train (1999) and #2 Dark Cellar (2001). Any horror?\n"
        "recommender: What of #3 Paper Hearts (2005)?\nseeker: Not that\nquery:"
    )
    assert heuristic_query(redial.Case("1", 0, (), ("30",)), genres) == " good movie"
    assert (
        heuristic_query(redial.Case("1", 1, (Turn(True, "Hello there", ()),), ("30",)), genres)
        == " hello there"
    )
    assert pointed("#2 #3 horror #0 #9", ["10", "11"]) == "@11 3 horror 0 9"


def test_files_of_conversations(tmp_path):
    passages = template_conversations(MOVIES, MENTIONS, AugmentConfig(below=1, copies=2))
    path = tmp_path / "made.jsonl"
    write_conversations(path, passages)
    found = read_conversations(path, MOVIES)
    assert [(p.movie, p.turns, p.at) for p in found] == [(p.movie, p.turns, p.at) for p in passages]
    path.write_text(path.read_text() + json.dumps({"movie": "999", "turns": []}) + "\n")
    with pytest.raises(UserError, match=r"line 5: there is no movie 999 in the catalogue"):
        read_conversations(path, MOVIES)
    path.write_text('{"movie": "10"}\n')
    with pytest.raises(UserError, match=r"line 1: must be an object with movie and turns"):
        read_conversations(path, MOVIES)
    path.write_text("")
    with pytest.raises(UserError, match="is empty"):
        read_conversations(path, MOVIES)
    with pytest.raises(UserError, match="cannot be read"):
        read_conversations(tmp_path / "none.jsonl", MOVIES)
