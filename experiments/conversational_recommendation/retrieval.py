"""BM25 over movies' documents, by bm25s; the query is the conversation so far.

    score(q, d) = sum_{t in q} idf(t) tf(t, d) / (tf(t, d) + k1 (1 - b + b |d| / mean |d|))
    idf(t) = ln(1 + (N - df(t) + 1/2) / (df(t) + 1/2))

Robertson & Zaragoza 2009 with Lucene's idf, which is never negative (Kamphuis et al. 2020). A token
that is twice in the query counts twice, unless the query is made distinct.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from bm25 import bm25s
from documents import Tokenizer, Tokens
from redial import Case, Dialogue

from perl_jax.errors import UserError, positive, require, whole


@dataclasses.dataclass(frozen=True)
class BM25Config:
    """k1: how slowly a token's count saturates. b: how far long documents are scaled down, 0 to
    1.
    """

    k1: float = 1.5
    b: float = 0.3

    def __post_init__(self) -> None:
        positive("k1", self.k1)
        require(0 <= self.b <= 1, f"b is {self.b!r}; it must lie in [0, 1].")


@dataclasses.dataclass(frozen=True)
class QueryConfig:
    """What of a conversation is the query.

    Attributes:
        turns: The last so many turns; None: all.
        seeker_only: Leave out what the recommender said.
        distinct: Every token once.
    """

    turns: int | None = 8
    seeker_only: bool = False
    distinct: bool = True

    def __post_init__(self) -> None:
        if self.turns is not None:
            whole("turns", self.turns)


class Index:
    """A BM25 index of documents. An unknown token scores nothing; a query without a known one, zero
    everywhere.
    """

    def __init__(self, documents: Sequence[Tokens], config: BM25Config) -> None:
        require(any(documents), "There is nothing to index: every document is empty.")
        self.model = bm25s.BM25(k1=config.k1, b=config.b, method="lucene", dtype="float64")
        self.model.index(list(documents), show_progress=False)

    def known(self, tokens: Iterable[str]) -> list[int]:
        """Ids of the tokens that occur in a document."""
        vocabulary = self.model.vocab_dict
        return [vocabulary[token] for token in tokens if token in vocabulary]

    def scores(self, tokens: Iterable[str], weights: np.ndarray | None = None) -> np.ndarray:
        """Every document's score, float64; weights: one factor a document."""
        known = self.known(tokens)
        if not known:
            return np.zeros(self.model.scores["num_docs"])
        return self.model.get_scores_from_ids(known, weight_mask=weights)

    def save(self, folder: pathlib.Path) -> None:
        self.model.save(str(folder), show_progress=False)

    @classmethod
    def load(cls, folder: pathlib.Path) -> Index:
        """UserError where there is no index."""
        try:
            model = bm25s.BM25.load(str(folder), show_progress=False)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{folder} holds no index that can be read ({error}).") from error
        index = cls.__new__(cls)
        index.model = model
        return index


def query_tokens(case: Case, config: QueryConfig, tokenizer: Tokenizer) -> Tokens:
    """The conversation so far as tokens."""
    turns = case.context if config.turns is None else case.context[-config.turns :]
    tokens = tokenizer.turns(turn for turn in turns if turn.seeker or not config.seeker_only)
    return list(dict.fromkeys(tokens)) if config.distinct else tokens


def popularity(dialogues: Iterable[Dialogue], position: Mapping[str, int]) -> np.ndarray:
    """How many training dialogues recommend each movie of the catalogue, float64."""
    counts = np.zeros(len(position))
    for dialogue in dialogues:
        for movie in {movie for turn in dialogue.turns if not turn.seeker for movie in turn.movies}:
            if movie in position:
                counts[position[movie]] += 1
    return counts


@dataclasses.dataclass
class Retriever:
    """BM25 as a recommender.

    fallback: scores for a case whose query has no known token, such as one without a context;
    empty_queries counts them.
    """

    index: Index
    tokenizer: Tokenizer
    query: QueryConfig
    fallback: np.ndarray
    empty_queries: int = 0

    def scores(self, case: Case) -> np.ndarray:
        tokens = query_tokens(case, self.query, self.tokenizer)
        if not self.index.known(tokens):
            self.empty_queries += 1
            return self.fallback
        return self.index.scores(tokens)


@dataclasses.dataclass(frozen=True)
class Fixed:
    """The same scores for every case: popularity."""

    values: np.ndarray

    def scores(self, case: Case) -> np.ndarray:
        return self.values


@dataclasses.dataclass(frozen=True)
class Random:
    """Scores that depend on the seed and on which case it is, and on nothing else."""

    n: int
    seed: int = 0

    def scores(self, case: Case) -> np.ndarray:
        text = f"{self.seed} {case.dialogue} {case.turn}".encode()
        return np.random.default_rng(list(text)).random(self.n)


@dataclasses.dataclass(frozen=True)
class Repeat:
    """Movies that the conversation mentioned, the latest first; then the popular ones."""

    position: Mapping[str, int]
    popular: np.ndarray

    def scores(self, case: Case) -> np.ndarray:
        scores = self.popular / (1.0 + self.popular.max())  # below 1, the least that a mention gets
        mentioned = [self.position[movie] for movie in case.mentioned if movie in self.position]
        scores[mentioned] = np.arange(len(mentioned), 0, -1)
        return scores
