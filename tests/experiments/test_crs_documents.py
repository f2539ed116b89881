"""Documents: fields, conversations, tokens; and that nothing of a test dialogue is in one."""

from __future__ import annotations

import dataclasses
import json

import pytest
import redial
import systems
from augment import AugmentConfig, template_conversations
from documents import (
    FIELDS,
    METADATA,
    PAPER,
    DocumentConfig,
    Tokenizer,
    TokenizerConfig,
    documents_of,
    passages_of,
)
from redial import Movie

from perl_jax.errors import UserError
from tests.experiments import tiny_redial
from tests.paths import REDIAL

MOVIES = {
    "1": Movie(
        "1", "Night Train", "1999", ("horror",), ("Ada Moss",), ("Bo Lind",), "A haunted sleeper."
    ),
    "2": Movie("2", "Dark Cellar", "2001", ("mystery",), ("Cy Orr",), ("Di Paz",), "Doors close."),
}
PLAIN = TokenizerConfig(stem=False, stopwords=False, mentions="both")
NAMES = {"1": "Night Train (1999)", "2": "Dark Cellar (2001)"}


def dialogue(said, number=7):
    return redial.parse_dialogue(json.dumps(tiny_redial.row(number, said, NAMES)), "here")


TALK = dialogue(
    [
        ("s", "creepy please"),
        ("r", "seen @2 already"),
        ("s", "no, like @1"),
        ("r", "@2 then, or @1"),
        ("s", "thanks"),
    ]
)


def document(config, movie="1", dialogues=(TALK,), augmented=(), tokenizer=PLAIN):
    texts = documents_of(MOVIES, config, Tokenizer(tokenizer, MOVIES), dialogues, augmented)
    return dict(zip(MOVIES, texts, strict=True))[movie]


@pytest.mark.parametrize(
    ("field", "tokens"),
    [
        ("title", ["night", "train", "@1"]),
        ("genre", ["horror"]),
        ("director", ["ada", "moss"]),
        ("cast", ["bo", "lind"]),
        ("plot", ["a", "haunted", "sleeper"]),
        ("augmented", []),
    ],
)
def test_each_field_alone(field, tokens):
    assert document(DocumentConfig((field,))) == tokens


def test_fields_are_joined_in_the_order_given_and_unknown_ones_refused():
    assert document(DocumentConfig(("cast", "genre"))) == ["bo", "lind", "horror"]
    with pytest.raises(UserError, match="fields is 'colour'; it must be one of title, genre"):
        DocumentConfig(("title", "colour"))
    with pytest.raises(UserError, match="each may occur once"):
        DocumentConfig(("title", "title"))
    with pytest.raises(UserError, match="fields is empty"):
        DocumentConfig(())


def test_conversations_before_the_recommendation_are_the_papers():
    before = document(dataclasses.replace(PAPER, fields=("conversations",)))
    # @1 is first recommended in the fourth turn; what follows is not taken.
    assert before == [
        "creepy",
        "please",
        "seen",
        "dark",
        "cellar",
        "@2",
        "already",
        "no",
        "like",
        "night",
        "train",
        "@1",
    ]
    assert document(dataclasses.replace(PAPER, fields=("conversations",), turns=1)) == [
        "no",
        "like",
        "night",
        "train",
        "@1",
    ]
    # @2 was first recommended in the second turn.
    assert document(dataclasses.replace(PAPER, fields=("conversations",)), "2") == [
        "creepy",
        "please",
    ]


def test_conversations_around_any_mention():
    around = document(DocumentConfig(("conversations",), of="mentioned", span="whole", turns=1))
    # The seeker brought @1 up in the third turn: one turn before, that turn, one after.
    expected = [
        "seen",
        "dark",
        "cellar",
        "@2",
        "already",
        "no",
        "like",
        "night",
        "train",
        "@1",
        "dark",
        "cellar",
        "@2",
        "then",
        "or",
        "night",
        "train",
        "@1",
    ]
    assert around == expected
    whole = document(DocumentConfig(("conversations",), of="mentioned", span="whole"))
    assert whole[:2] == ["creepy", "please"] and whole[-1] == "thanks"


def test_a_movie_has_one_passage_a_dialogue():
    assert [(p.movie, p.at) for p in passages_of([TALK], "mentioned")] == [("2", 1), ("1", 2)]
    assert [(p.movie, p.at) for p in passages_of([TALK], "recommended")] == [("2", 1), ("1", 3)]


def test_tokens_of_a_mention_and_of_words():
    text = "I LOVED @1, the trains weren't running!"
    make = lambda **more: Tokenizer(TokenizerConfig(**more), MOVIES).text(text)
    assert make(stem=False, stopwords=False, mentions="title") == [
        "i",
        "loved",
        "night",
        "train",
        "the",
        "trains",
        "weren't",
        "running",
    ]
    assert make(stem=False, stopwords=False, mentions="id") == [
        "i",
        "loved",
        "@1",
        "the",
        "trains",
        "weren't",
        "running",
    ]
    assert make(stem=True, stopwords=True, mentions="both") == [
        "i",
        "love",
        "night",
        "train",
        "@1",
        "train",
        "weren't",
        "run",
    ]
    assert Tokenizer(PLAIN, MOVIES).text("and @999?") == [
        "and",
        "@999",
    ]  # not in the catalogue: no title, its own token
    with pytest.raises(UserError, match="mentions is 'none'"):
        TokenizerConfig(mentions="none")


# ------------------------------------------------------------------------------ leakage


def every_document(found, dialogues):
    """Tokens of all documents with every field on, and of the conversations that user selection
    reads.
    """
    movies = found.movies
    tokenizer = Tokenizer(PLAIN, movies)
    mentions = systems.mention_counts(dialogues, {movie: i for i, movie in enumerate(movies)})
    augmented = template_conversations(movies, mentions, AugmentConfig(below=2, copies=1))
    texts = documents_of(movies, DocumentConfig(FIELDS), tokenizer, dialogues, augmented)
    return [*texts, *(tokenizer.turns(d.turns) for d in dialogues)]


def test_a_sentence_planted_in_the_test_side_reaches_no_document(tmp_path):
    found = redial.read_redial(str(tiny_redial.small(tmp_path, words="zyzzyva quagga")))
    said = {
        token
        for dialogue in found.test
        for turn in dialogue.turns
        for token in Tokenizer(PLAIN, found.movies).text(turn.text)
    }
    assert {"zyzzyva", "quagga"} <= said  # it is in the test side
    in_documents = {token for text in every_document(found, found.train) for token in text}
    assert not {"zyzzyva", "quagga"} & in_documents
    assert "scary" in in_documents
    # The check would see it: with the test side among the dialogues the words are there, and
    # refused.
    leaked = {
        token for text in every_document(found, [*found.train, *found.test]) for token in text
    }
    assert {"zyzzyva", "quagga"} <= leaked
    with pytest.raises(
        UserError, match="1 test dialogues are among those that documents are made of, 901 first"
    ):
        systems.check_apart(systems.Data(found.movies, [*found.train, found.test[1]]), found.test)


def test_a_train_copy_of_a_test_dialogue_reaches_no_document(tmp_path):
    folder = tiny_redial.small(tmp_path, words="zyzzyva quagga")
    lines = (folder / "test_data.jsonl").read_text().splitlines()
    copy = json.loads(lines[0])
    copy["conversationId"] = "1"  # under another id, cut into other messages
    copy["messages"][0]["text"] += " " + copy["messages"].pop(1)["text"]
    (folder / "valid_data.jsonl").write_text(
        (folder / "valid_data.jsonl").read_text() + json.dumps(copy) + "\n"
    )
    found = redial.read_redial(str(folder))
    assert found.repeated == 1
    assert not {"zyzzyva", "quagga"} & {
        token for text in every_document(found, found.train) for token in text
    }


@pytest.mark.skipif(REDIAL is None or not REDIAL.is_dir(), reason="no copy of ReDial")
def test_the_real_test_side_reaches_no_document():
    found = redial.read_redial(str(REDIAL))
    assert not {d.id for d in found.train} & {d.id for d in found.test}
    assert not {redial.content_of(d) for d in found.train} & {
        redial.content_of(d) for d in found.test
    }
    # A test dialogue's name for a movie must not become its document's title.
    known = json.loads((REDIAL / "id2info.json").read_text())
    named = {movie for d in found.train for turn in d.turns for movie in turn.movies}
    assert all(movie in known or movie in named for movie in found.movies)
    # Words that only the test side uses: no document has one, and half of the test dialogues would
    # bring some.
    tokenizer = Tokenizer(PLAIN, found.movies)
    documents = {
        token
        for text in documents_of(found.movies, DocumentConfig(), tokenizer, found.train)
        for token in text
    }
    said = [
        {token for turn in d.turns for token in tokenizer.words(redial.MENTION.sub(" ", turn.text))}
        for d in found.test
    ]
    allowed = {
        token for d in found.train for turn in d.turns for token in tokenizer.text(turn.text)
    }
    allowed |= {
        token
        for text in documents_of(found.movies, DocumentConfig(METADATA), tokenizer)
        for token in text
    }
    own = [words - allowed for words in said]
    assert not set().union(*own) & documents
    assert sum(map(bool, own)) > 500
