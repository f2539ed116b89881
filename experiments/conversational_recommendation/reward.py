"""The bridge to perl_jax: a query's retrieval as a reward.

A policy that is shown a conversation writes a query; BM25 ranks the catalogue by it; the right
movies' ranks pay:

    R = mean over the case's new targets of 1 / log2(1 + rank)

which is 1 for the first place, 0.29 for the tenth and 0.08 for the last of 6,600, so that every
step up the ranking counts (it is NDCG without a cut, of each target alone; Jarvelin & Kekalainen
2002). Movies that the conversation had mentioned are not in the ranking, and a query without a
known word is paid nothing. As a term of any `perl-jax` command:

    --terms '[{"kind": "function", "function":
    "experiments/conversational_recommendation/reward.py:score"}]'

with the index's folder in the environment variable CONVERSATIONAL_RECOMMENDATION_INDEX, and rows
whose `answer` is {"targets": [ID, ...], "mentioned": [ID, ...]} as JSON text, the mentioned movies
in the order in which they came up: #n in a query is the n-th of them, so that even a small policy
can point at a title that it could not spell.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from augment import Linker
from documents import Tokenizer, TokenizerConfig
from ranking import ranks_of, tie_order
from redial import Movie
from retrieval import Index
from texts import pointed

from perl_jax.errors import UserError, require
from perl_jax.runtime.files import read_json, write_json

VARIABLE = "CONVERSATIONAL_RECOMMENDATION_INDEX"


@dataclasses.dataclass(frozen=True)
class QueryIndex:
    """An index with all that turns a written query into ranks."""

    index: Index
    tokenizer: Tokenizer
    movies: Mapping[str, Movie]

    @functools.cached_property
    def position(self) -> dict[str, int]:
        return {movie: i for i, movie in enumerate(self.movies)}

    @functools.cached_property
    def linker(self) -> Linker:
        return Linker(self.movies)

    @functools.cached_property
    def order(self) -> np.ndarray:
        return tie_order(len(self.movies))

    def tokens(self, query: str, introduced: Sequence[str] = ()) -> list[str]:
        """A query's distinct tokens; #n, the n-th movie of the conversation, and whole titles are
        mentions.
        """
        return list(
            dict.fromkeys(self.tokenizer.text(self.linker.linked(pointed(query, introduced))))
        )

    def ranks(
        self, query: str | Sequence[str], targets: Sequence[str], mentioned: Sequence[str]
    ) -> np.ndarray:
        """The targets' ranks among movies not mentioned; infinite outside the catalogue or without
        a known word.

        query: text, or tokens. mentioned: the conversation's movies, in the order in which they
        came up.
        """
        tokens = self.tokens(query, mentioned) if isinstance(query, str) else query
        found = np.full(len(targets), np.inf)
        known = [i for i, movie in enumerate(targets) if movie in self.position]
        if self.index.known(tokens) and known:
            left_out = [self.position[movie] for movie in mentioned if movie in self.position]
            found[known] = ranks_of(
                self.index.scores(tokens),
                [self.position[targets[i]] for i in known],
                self.order,
                left_out,
            )
        return found

    def reward(self, query: str | Sequence[str], answer: str) -> float:
        targets, mentioned = read_answer(answer)
        return float(np.mean(1.0 / np.log2(1.0 + self.ranks(query, targets, mentioned))))

    def save(self, folder: pathlib.Path) -> None:
        """The index in a folder that `load` reads; `catalogue.json` last."""
        self.index.save(folder)
        movies = [[movie.id, movie.title, movie.year] for movie in self.movies.values()]
        write_json(
            folder / "catalogue.json",
            {"tokenizer": dataclasses.asdict(self.tokenizer.config), "movies": movies},
        )

    @classmethod
    def load(cls, folder: pathlib.Path) -> QueryIndex:
        require(
            (folder / "catalogue.json").is_file(),
            f"{folder} holds no index of movies; rl.py writes one.",
        )
        value = read_json(folder / "catalogue.json")
        movies = {movie: Movie(movie, title, year) for movie, title, year in value["movies"]}
        return cls(
            Index.load(folder), Tokenizer(TokenizerConfig(**value["tokenizer"]), movies), movies
        )


def write_answer(targets: Sequence[str], mentioned: Sequence[str]) -> str:
    return json.dumps({"targets": list(targets), "mentioned": list(mentioned)})


def read_answer(answer: str) -> tuple[list[str], list[str]]:
    """(targets, mentioned). UserError for anything else, and for no target."""
    form = 'it must be {"targets": [ID, ...], "mentioned": [ID, ...]}'
    try:
        value: Any = json.loads(answer)
        targets, mentioned = list(value["targets"]), list(value["mentioned"])
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"A row's answer is {answer[:80]!r}; {form}.") from error
    require(bool(targets), f"A row's answer is {answer[:80]!r}; {form} with one target or more.")
    return targets, mentioned


@functools.cache
def loaded() -> QueryIndex:
    folder = os.environ.get(VARIABLE)
    require(bool(folder), f"Set {VARIABLE} to the folder of an index.")
    return QueryIndex.load(pathlib.Path(folder))


def score(
    prompts: Sequence[str], responses: Sequence[str], rows: Sequence[Mapping[str, Any]]
) -> list[float]:
    """One reward a response (see the module)."""
    index = loaded()
    return [
        index.reward(response, row["answer"]) for response, row in zip(responses, rows, strict=True)
    ]
