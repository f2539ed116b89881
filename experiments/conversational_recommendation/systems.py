"""What is compared: settings of the whole system, recommenders built from them, and their
tuning.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from augment import AugmentConfig, cold_movies, neighbours_of, template_conversations
from documents import DocumentConfig, Passage, Tokenizer, TokenizerConfig, documents_of
from ranking import CUTS, ranks_of, single_measures, tie_order
from redial import Case, Dialogue, Movie, cases_of
from retrieval import BM25Config, Index, QueryConfig, Retriever, popularity
from users import UserConfig, UserRetriever

from perl_jax.errors import require


class Recommender(Protocol):
    """Anything that scores the whole catalogue for a case."""

    def scores(self, case: Case) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Settings:
    """The whole system's; users None: no user selection."""

    bm25: BM25Config = BM25Config()
    tokenizer: TokenizerConfig = TokenizerConfig()
    documents: DocumentConfig = DocumentConfig()
    query: QueryConfig = QueryConfig()
    users: UserConfig | None = None
    augment: AugmentConfig = AugmentConfig()

    def with_(self, **parts: Any) -> Settings:
        return dataclasses.replace(self, **parts)


# BM25 of the conversations themselves, from which similar seekers' are chosen; the usual values.
CONVERSATIONS_BM25 = BM25Config(1.2, 0.75)


@dataclasses.dataclass(frozen=True)
class Data:
    """The catalogue, and the only dialogues that anything may be built from."""

    movies: Mapping[str, Movie]
    dialogues: Sequence[Dialogue]
    augmented: Sequence[Passage] = ()

    @property
    def position(self) -> dict[str, int]:
        return {movie: i for i, movie in enumerate(self.movies)}


def check_apart(data: Data, test: Iterable[Dialogue]) -> None:
    """UserError if a test dialogue is among those that documents are made of."""
    shared = {d.id for d in data.dialogues} & {d.id for d in test}
    shared |= {passage.dialogue for passage in data.augmented} & {d.id for d in test}
    require(
        not shared,
        f"{len(shared)} test dialogues are among those that documents are made of, "
        f"{min(shared, default='')} first.",
    )


def build(
    settings: Settings, data: Data, tokenizer: Tokenizer | None = None
) -> Retriever | UserRetriever:
    """The retriever of some settings, from the data alone. tokenizer: one of the same settings,
    which remembers.
    """
    tokenizer = tokenizer or Tokenizer(settings.tokenizer, data.movies)
    documents = documents_of(
        data.movies, settings.documents, tokenizer, data.dialogues, data.augmented
    )
    fallback = popularity(data.dialogues, data.position)
    retriever = Retriever(Index(documents, settings.bm25), tokenizer, settings.query, fallback)
    if settings.users is None:
        return retriever
    return UserRetriever(retriever, data.dialogues, data.movies, CONVERSATIONS_BM25, settings.users)


def mention_counts(dialogues: Iterable[Dialogue], position: Mapping[str, int]) -> np.ndarray:
    """How many training dialogues mention each movie, whoever does."""
    counts = np.zeros(len(position), int)
    for dialogue in dialogues:
        for movie in {movie for turn in dialogue.turns for movie in turn.movies}:
            if movie in position:
                counts[position[movie]] += 1
    return counts


def objective(
    recommender: Recommender, cases: Sequence[Case], position: Mapping[str, int]
) -> float:
    """Mean of recall at 1, 10 and 50 over all targets of validation cases."""
    order, ranks = tie_order(len(position)), []
    for case in cases:
        known = [position[movie] for movie in case.targets if movie in position]
        ranks += [
            *ranks_of(recommender.scores(case), known, order),
            *[np.inf] * (len(case.targets) - len(known)),
        ]
    return float(single_measures(np.array(ranks))[:, : len(CUTS)].mean())


# part of the settings, field, values: searched one after the other.
GRID: tuple[tuple[str, str, tuple], ...] = (
    ("documents", "of", ("recommended", "mentioned")),
    ("documents", "span", ("before", "whole")),
    ("documents", "turns", (1, 2, 4, 8, None)),
    ("bm25", "b", (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.75)),
    ("bm25", "k1", (0.5, 0.9, 1.2, 1.5, 2.0, 4.0)),
    ("tokenizer", "mentions", ("title", "id", "both")),
    ("tokenizer", "stem", (True, False)),
    ("tokenizer", "stopwords", (True, False)),
    ("query", "turns", (2, 4, 8, None)),
    ("query", "seeker_only", (False, True)),
    ("query", "distinct", (True, False)),
)
USER_GRID: tuple[tuple[str, str, tuple], ...] = (
    ("users", "alike", (0.0, 0.25, 0.5, 0.75, 1.0)),
    ("users", "weight", (0.0, 0.1, 0.2, 0.4, 0.8)),
    ("users", "neighbours", (20, 50, 100, 200)),
    ("users", "genre", (0.0, 0.3, 1.0)),
)
AUGMENT_GRID: tuple[tuple[str, str, tuple], ...] = (
    ("augment", "below", (1, 2, 5)),
    ("augment", "copies", (2, 4, 8, 16)),
)


@dataclasses.dataclass(frozen=True)
class Trial:
    """One point of the search."""

    part: str
    field: str
    value: Any
    objective: float


def tune(
    settings: Settings,
    score: Callable[[Settings], float],
    grid: Sequence[tuple[str, str, tuple]] = GRID,
    rounds: int = 2,
) -> tuple[Settings, list[Trial]]:
    """Coordinate ascent: each field in turn takes its best value, ties going to the earlier one,
    until a round changes nothing.
    """
    trials: list[Trial] = []
    seen: dict[Settings, float] = {}
    for _ in range(rounds):
        start = settings
        for part, field, values in grid:
            found = []
            for value in values:
                candidate = settings.with_(
                    **{part: dataclasses.replace(getattr(settings, part), **{field: value})}
                )
                if candidate not in seen:
                    seen[candidate] = score(candidate)
                found.append((seen[candidate], candidate))
                trials.append(Trial(part, field, value, seen[candidate]))
            settings = max(found, key=lambda pair: pair[0])[1]
        if settings == start:
            break
    return settings, trials


@dataclasses.dataclass
class Validation:
    """Scores settings on the validation dialogues, with documents made of `fit` alone."""

    fit: Sequence[Dialogue]
    validation: Sequence[Dialogue]
    movies: Mapping[str, Movie]

    def __post_init__(self) -> None:
        self.data = Data(self.movies, self.fit)
        check_apart(self.data, self.validation)
        self._cases = [case for dialogue in self.validation for case in cases_of(dialogue)]
        self._position, self._tokenizers = self.data.position, {}
        self._mentions = mention_counts(self.fit, self._position)
        self._neighbours: dict[int, dict] = {}

    def __call__(self, settings: Settings) -> float:
        data = self.data
        if "augmented" in settings.documents.fields:
            data = dataclasses.replace(data, augmented=self.augmented(settings.augment))
        tokenizer = self._tokenizers.setdefault(
            settings.tokenizer, Tokenizer(settings.tokenizer, self.movies)
        )
        return objective(build(settings, data, tokenizer), self._cases, self._position)

    def augmented(self, config: AugmentConfig) -> list[Passage]:
        if config.below not in self._neighbours:
            self._neighbours[config.below] = neighbours_of(
                self.movies, cold_movies(self.movies, self._mentions, config.below), self._mentions
            )
        return template_conversations(
            self.movies, self._mentions, config, self._neighbours[config.below]
        )
