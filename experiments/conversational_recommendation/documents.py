"""Movies as documents: fields that can be switched on and off, and the words that documents and
queries share.

A document is the movie's metadata and the turns that came before it where it was recommended in a
training conversation (Gupta et al. 2023, arXiv 2305.13725), as one bag of tokens.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import Stemmer
from bm25 import STOPWORDS_EN
from redial import MENTION, Dialogue, Movie, Turn

from perl_jax.errors import one_of, require, whole

METADATA = ("title", "genre", "director", "cast", "plot")
FIELDS = (*METADATA, "conversations", "augmented")
MENTIONS = ("title", "id", "both")
OF, SPANS = ("recommended", "mentioned"), ("before", "whole")
WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)?")

Tokens = list[str]


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """How text becomes tokens.

    Attributes:
        stem: Snowball's English stems instead of words.
        stopwords: Leave out bm25s's list of English function words.
        mentions: A mentioned movie is the words of its title, one token that stands for it, or
            both.
    """

    stem: bool = True
    stopwords: bool = True
    mentions: str = "both"

    def __post_init__(self) -> None:
        one_of("mentions", self.mentions, MENTIONS)


class Tokenizer:
    """Text and turns to tokens. It only remembers what it was asked before; the result does not
    depend on that.
    """

    def __init__(self, config: TokenizerConfig, movies: Mapping[str, Movie]) -> None:
        self.config, self.movies = config, movies
        self._left_out = frozenset(STOPWORDS_EN) if config.stopwords else frozenset()
        self._stem: Callable[[str], str] = (
            Stemmer.Stemmer("english").stemWord if config.stem else str
        )
        self._words: dict[str, Tokens] = {}
        self._turns: dict[str, Tokens] = {}

    def words(self, text: str) -> Tokens:
        """Lower-case words of plain text."""
        found = self._words.get(text)
        if found is None:
            words = WORD.findall(text.lower())
            found = self._words[text] = [
                self._stem(word) for word in words if word not in self._left_out
            ]
        return found

    def mention(self, movie: str) -> Tokens:
        """A mentioned movie; one that the catalogue does not know has no title, only its own
        token.
        """
        title = (
            self.words(self.movies[movie].title)
            if movie in self.movies and self.config.mentions != "id"
            else []
        )
        return [*title, f"@{movie}"] if self.config.mentions != "title" else list(title)

    def text(self, text: str) -> Tokens:
        """Text with mentions, @ and a movie's id."""
        found = self._turns.get(text)
        if found is None:
            # split gives text, id, text, ...: MENTION has one group.
            parts = MENTION.split(text)
            found = [
                token
                for i, part in enumerate(parts)
                for token in (self.mention(part) if i % 2 else self.words(part))
            ]
            self._turns[text] = found
        return found

    def turns(self, turns: Iterable[Turn]) -> Tokens:
        return [token for turn in turns for token in self.text(turn.text)]


@dataclasses.dataclass(frozen=True)
class DocumentConfig:
    """What a document is made of.

    Attributes:
        fields: Some of FIELDS, each once.
        of: The training conversations of a movie: those that recommended it (the paper's), or all
            that mention it, whoever did.
        span: What is taken of such a conversation: the turns before the mention (the paper's), or
            those after it as well.
        turns: At most so many turns before the mention, and so many after it; None: all.
    """

    fields: tuple[str, ...] = (*METADATA, "conversations")
    of: str = "mentioned"
    span: str = "whole"
    turns: int | None = None

    def __post_init__(self) -> None:
        require(bool(self.fields), f"fields is empty; it must hold some of {', '.join(FIELDS)}.")
        for field in self.fields:
            one_of("fields", field, FIELDS)
        require(
            len(set(self.fields)) == len(self.fields),
            f"fields is {', '.join(self.fields)}; each may occur once.",
        )
        one_of("of", self.of, OF)
        one_of("span", self.span, SPANS)
        if self.turns is not None:
            whole("turns", self.turns)


PAPER = DocumentConfig(of="recommended", span="before")


@dataclasses.dataclass(frozen=True)
class Passage:
    """A conversation that speaks of `movie`, first in its turn number `at`. dialogue: its id."""

    movie: str
    dialogue: str
    turns: tuple[Turn, ...]
    at: int


def passages_of(dialogues: Iterable[Dialogue], of: str = "mentioned") -> list[Passage]:
    """One for each movie of each dialogue, at its first mention (of = recommended: by the
    recommender).
    """
    passages = []
    for dialogue in dialogues:
        first: dict[str, int] = {}
        for index, turn in enumerate(dialogue.turns):
            if of == "mentioned" or not turn.seeker:
                for movie in turn.movies:
                    first.setdefault(movie, index)
        passages += [Passage(movie, dialogue.id, dialogue.turns, at) for movie, at in first.items()]
    return passages


def passage_tokens(passage: Passage, config: DocumentConfig, tokenizer: Tokenizer) -> Tokens:
    """The turns of a passage that a document takes."""
    reach = len(passage.turns) if config.turns is None else config.turns
    end = passage.at if config.span == "before" else passage.at + reach + 1
    return tokenizer.turns(passage.turns[max(0, passage.at - reach) : end])


def metadata_tokens(movie: Movie, field: str, tokenizer: Tokenizer) -> Tokens:
    """One field of a movie's metadata; its title brings the token that stands for it."""
    if field == "title":
        return (
            [*tokenizer.words(movie.title), f"@{movie.id}"]
            if tokenizer.config.mentions != "title"
            else list(tokenizer.words(movie.title))
        )
    text = {
        "genre": movie.genres,
        "director": movie.directors,
        "cast": movie.cast,
        "plot": (movie.plot,),
    }[field]
    return [token for part in text for token in tokenizer.words(part)]


def documents_of(
    movies: Mapping[str, Movie],
    config: DocumentConfig,
    tokenizer: Tokenizer,
    dialogues: Sequence[Dialogue] = (),
    augmented: Sequence[Passage] = (),
) -> list[Tokens]:
    """The document of every movie, in the catalogue's order.

    dialogues: the training conversations; augmented: made-up ones, each for its movie. Passages of
    movies outside the catalogue are left out.
    """
    found = {
        movie.id: [
            token
            for field in config.fields
            if field in METADATA
            for token in metadata_tokens(movie, field, tokenizer)
        ]
        for movie in movies.values()
    }
    for field, passages in (
        ("conversations", passages_of(dialogues, config.of)),
        ("augmented", augmented),
    ):
        if field in config.fields:
            for passage in passages:
                if passage.movie in found:
                    found[passage.movie] += passage_tokens(passage, config, tokenizer)
    return list(found.values())
