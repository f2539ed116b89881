"""Made-up conversations for movies with few or none: the cold-start problem.

Two writers. `template_conversations` needs no model: it fills sentences with the movie's genres,
people and neighbours, which are movies of training conversations with the most similar metadata.
`language_model.py` writes through perl_jax's sampler. Both give the same rows, one JSON object a
line: {"movie": ID, "turns": [{"seeker": true, "text": "... @ID ..."}, ...]}, the last turn being
the recommendation.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import random
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from documents import METADATA, DocumentConfig, Passage, Tokenizer, TokenizerConfig, documents_of
from ranking import tie_order, top
from redial import MENTION, Movie, Turn
from retrieval import BM25Config, Index

from perl_jax.errors import UserError, require, whole
from perl_jax.runtime.files import write_atomically

NEIGHBOURS = 8
OPENINGS = (
    "Hi, I am looking for {article} {genre} movie.",
    "Hello! Can you recommend {article} {genre} film?",
    "Hi there, I'd like to watch something {genre} tonight.",
    "I am in the mood for {article} {genre} movie.",
)
QUESTIONS = (
    "Sure! What have you liked before?",
    "Do you have a favorite?",
    "Any movies you enjoyed recently?",
    "What did you watch last?",
)
LIKED = (
    "I really liked {movies}.",
    "I loved {movies}.",
    "My favorites are {movies}.",
    "I enjoyed {movies} a lot.",
)
PEOPLE = (
    "I like movies with {person}.",
    "Is there something with {person}?",
    "I am a fan of {person}.",
)
RECOMMENDATIONS = (
    "Have you seen {movie}?",
    "You should watch {movie}.",
    "I would recommend {movie}.",
    "Then you will like {movie}.",
)


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """Which movies get made-up conversations, and how many.

    Attributes:
        below: Movies in fewer than so many training conversations.
        copies: Conversations for each.
        seed: Of the choice of sentences, people and neighbours.
    """

    below: int = 5
    copies: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        whole("below", self.below)
        whole("copies", self.copies)


def cold_movies(movies: Mapping[str, Movie], mentions: np.ndarray, below: int) -> list[Movie]:
    """Movies in fewer than `below` training conversations; mentions: how many each is in."""
    return [movie for movie, count in zip(movies.values(), mentions, strict=True) if count < below]


def neighbours_of(
    movies: Mapping[str, Movie], wanted: Iterable[Movie], mentions: np.ndarray
) -> dict[str, list[str]]:
    """For each wanted movie, the most similar others that occur in training conversations.

    Similar: BM25 with the movie's metadata as the query, over documents of metadata.
    """
    tokenizer = Tokenizer(TokenizerConfig(mentions="title"), movies)
    documents = documents_of(movies, DocumentConfig(METADATA), tokenizer)
    index, order, ids = (
        Index(documents, BM25Config(1.2, 0.75)),
        tie_order(len(movies)),
        list(movies),
    )
    position = {movie: i for i, movie in enumerate(ids)}
    unseen = np.flatnonzero(mentions == 0)
    found = {}
    for movie in wanted:
        own = position[movie.id]
        scores = index.scores(dict.fromkeys(documents[own]))
        best = top(scores, NEIGHBOURS, order, left_out=[own, *unseen])
        found[movie.id] = [ids[i] for i in best if i != own and mentions[i] > 0 and scores[i] > 0]
    return found


def template_conversation(
    movie: Movie, neighbours: Sequence[str], generator: random.Random
) -> tuple[Turn, ...]:
    """One conversation that ends in the recommendation; a movie of which nothing is known gets a
    plain one.
    """
    genre = " ".join(generator.sample(movie.genres, min(2, len(movie.genres)))) or "good"
    article = "an" if genre[0] in "aeiou" else "a"
    liked = generator.sample(list(neighbours), min(2, len(neighbours)))
    people = [*movie.cast, *movie.directors]
    answer = (
        [generator.choice(LIKED).format(movies=" and ".join(f"@{other}" for other in liked))]
        if liked
        else []
    )
    answer += [generator.choice(PEOPLE).format(person=generator.choice(people))] if people else []
    said = [(True, generator.choice(OPENINGS).format(article=article, genre=genre))]
    if answer:
        said += [(False, generator.choice(QUESTIONS)), (True, " ".join(answer))]
    said.append((False, generator.choice(RECOMMENDATIONS).format(movie=f"@{movie.id}")))
    return tuple(
        Turn(seeker, text, tuple(dict.fromkeys(MENTION.findall(text)))) for seeker, text in said
    )


def template_conversations(
    movies: Mapping[str, Movie],
    mentions: np.ndarray,
    config: AugmentConfig,
    neighbours: Mapping[str, Sequence[str]] | None = None,
) -> list[Passage]:
    """Conversations for cold movies, the same for the same seed whatever other movies there are.

    neighbours: of `neighbours_of` for at least the cold movies, where they are known already.
    """
    wanted = cold_movies(movies, mentions, config.below)
    neighbours = neighbours_of(movies, wanted, mentions) if neighbours is None else neighbours
    passages = []
    for movie in wanted:
        generator = random.Random(f"{config.seed} {movie.id}")
        for copy in range(config.copies):
            turns = template_conversation(movie, neighbours[movie.id], generator)
            passages.append(Passage(movie.id, f"template {movie.id} {copy}", turns, len(turns) - 1))
    return passages


class Linker:
    """Titles in running text to mentions and back: "The Shining (1980)" is @ID and @ID is that.

    Only whole titles with their year are linked, or titles of two words or more where no year is
    known: a title such as "It" would be found everywhere.
    """

    def __init__(self, movies: Mapping[str, Movie]) -> None:
        self._movies = movies
        self._ids: dict[str, str] = {}
        for movie in movies.values():
            if movie.year or " " in movie.title:
                self._ids.setdefault(self.name(movie.id).lower(), movie.id)
        # Candidates end in a year, or are found by their first word.
        self._longest = max((len(name.split()) for name in self._ids), default=0)

    def name(self, movie: str) -> str:
        """How a movie is written; one that is not in the catalogue is "a movie"."""
        found = self._movies.get(movie)
        return (
            "a movie"
            if found is None
            else f"{found.title} ({found.year})"
            if found.year
            else found.title
        )

    def unlinked(self, text: str) -> str:
        """Mentions as titles."""
        return MENTION.sub(lambda match: self.name(match[1]), text)

    def linked(self, text: str) -> str:
        """Titles as mentions, the longest first."""
        words = re.findall(r"\S+", text)
        out, i = [], 0
        while i < len(words):
            for n in range(min(self._longest, len(words) - i), 0, -1):
                candidate = " ".join(words[i : i + n]).lower()
                movie = self._ids.get(candidate) or self._ids.get(candidate.rstrip(".,;!?"))
                if movie is not None:
                    out.append(f"@{movie}")
                    i += n
                    break
            else:
                out.append(words[i])
                i += 1
        return " ".join(out)


def write_conversations(path: pathlib.Path, passages: Iterable[Passage]) -> None:
    rows = (
        {
            "movie": p.movie,
            "turns": [{"seeker": turn.seeker, "text": turn.text} for turn in p.turns],
        }
        for p in passages
    )
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_conversations(path: pathlib.Path, movies: Mapping[str, Movie]) -> list[Passage]:
    """Made-up conversations from a file. UserError naming the line, also for a movie that is not in
    the catalogue.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error
    passages = []
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
            movie = row["movie"]
            turns = tuple(
                Turn(bool(t["seeker"]), t["text"], tuple(dict.fromkeys(MENTION.findall(t["text"]))))
                for t in row["turns"]
            )
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{where}: must be an object with movie and turns, each with seeker and text "
                f"({error})."
            ) from error
        require(movie in movies, f"{where}: there is no movie {movie} in the catalogue.")
        passages.append(Passage(movie, f"{path.name} {number}", turns, len(turns) - 1))
    require(bool(passages), f"{path} is empty; it must hold one conversation a line.")
    return passages
