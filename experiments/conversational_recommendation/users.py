"""User-centric modelling: training conversations chosen and weighted by how alike their seekers'
likes are.

A seeker's profile has a weight for each liked movie, its inverse frequency among training profiles,
and one for each genre of those movies. A training conversation c is weighted by how alike its
seeker's profile is (cosine, over the largest one), scored by BM25 against the conversation so far,
and, if it is among the best, pays its score to the movies it mentions:

    user(q, i) = sum_{c in N(u, q) : i in c} w_c BM25(q, c),   w_c = (1 - alike) + alike cos(u, u_c)
    / max cos(u, .)

alike = 1 chooses among similar seekers alone, alike = 0 does not look at them. The paper (arXiv
2305.13725) rebuilds documents from the chosen conversations for every seeker; the sum above lets
one index serve all of them, and is added to the score of the movie's document.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import scipy.sparse
from documents import Tokenizer
from redial import MENTION, Case, Dialogue, Movie, Turn
from retrieval import BM25Config, Index, Retriever, query_tokens

from perl_jax.errors import positive, require, whole

LIKING = re.compile(
    r"\b(?:lov\w+|lik\w+|enjoy\w*|favou?rite\w*|great|awesome|amazing|excellent|fantastic|good)\b"
)
# No liking within the sentence: "I didn't like @1", "I haven't seen @1", "@1 was boring".
UNLIKING = re.compile(
    r"\b(?:not|no|never|hat\w+|dislik\w+|bad|bor\w+|worst|terrible|awful|stupid|\w+n'?t|havent|dont|didnt|wasnt|isnt|cant|doesnt)\b"
)
SENTENCE = re.compile(r"[.!?;]+|\bbut\b")


@dataclasses.dataclass(frozen=True)
class UserConfig:
    """How conversations of similar seekers count.

    Attributes:
        weight: Of their part beside the document's score; 0: none.
        neighbours: At most so many conversations are chosen.
        genre: What a liked movie's genre weighs beside the movie.
        alike: How much of a conversation's weight is the similarity of likes, 0 to 1.
    """

    weight: float = 0.4
    neighbours: int = 50
    genre: float = 1.0
    alike: float = 0.5

    def __post_init__(self) -> None:
        positive("weight", self.weight, zero=True)
        positive("genre", self.genre, zero=True)
        whole("neighbours", self.neighbours)
        require(0 <= self.alike <= 1, f"alike is {self.alike!r}; it must lie in [0, 1].")


def likes(context: Sequence[Turn]) -> list[str]:
    """Movies that the seeker has said to like so far, each once.

    A movie in a sentence of the seeker's without a word against it; and the recommender's movies
    where the seeker's next turn begins with praise. Nothing but the conversation is looked at: the
    forms of a dialogue are filled in after its end.
    """
    found: dict[str, None] = {}
    against: set[str] = set()
    for before, turn in zip((None, *context), context, strict=False):
        if not turn.seeker:
            continue
        sentences = [sentence for sentence in SENTENCE.split(turn.text.lower()) if sentence.strip()]
        if before is not None and before.movies and sentences:
            named = MENTION.search(sentences[0])
            if named is None and LIKING.search(sentences[0]) and not UNLIKING.search(sentences[0]):
                found.update(dict.fromkeys(before.movies))
        for sentence in sentences:
            movies = MENTION.findall(sentence)
            if UNLIKING.search(sentence):
                against.update(movies)
            else:
                found.update(dict.fromkeys(movies))
    return [movie for movie in found if movie not in against]


def known_likes(dialogue: Dialogue) -> list[str]:
    """Movies that a training seeker liked, by the forms; by the conversation where they say
    nothing.
    """
    stated = [movie for movie, label in dialogue.labels.items() if label.liked]
    return stated or likes(dialogue.turns)


class Profiles:
    """Training seekers' profiles as unit vectors, and the similarity of a new seeker's to each."""

    def __init__(
        self, likes_of: Sequence[Sequence[str]], movies: Mapping[str, Movie], genre: float
    ) -> None:
        self._movies, self._genre, self.n = movies, genre, len(likes_of)
        self._counts = collections.Counter(movie for liked in likes_of for movie in set(liked))
        self._features: dict[str, int] = {}
        rows, columns, values = [], [], []
        for row, liked in enumerate(likes_of):
            for feature, value in self.profile(liked).items():
                rows.append(row)
                columns.append(self._features.setdefault(feature, len(self._features)))
                values.append(value)
        self._vectors = scipy.sparse.csr_array(
            (values, (rows, columns)), shape=(self.n, max(1, len(self._features)))
        )

    def profile(self, liked: Iterable[str]) -> dict[str, float]:
        """ln(1 + N / (1 + seekers who like it)) for a movie, `genre` for each of its genres; of
        length 1.
        """
        weights: dict[str, float] = collections.defaultdict(float)
        for movie in dict.fromkeys(liked):
            weights[movie] += math.log1p(self.n / (1 + self._counts[movie]))
            for genre in (
                self._movies[movie].genres if movie in self._movies and self._genre else ()
            ):
                weights[f"genre {genre}"] += self._genre
        length = math.sqrt(sum(weight * weight for weight in weights.values()))
        return {feature: weight / length for feature, weight in weights.items()} if length else {}

    def similarity(self, liked: Iterable[str]) -> np.ndarray:
        """Cosine with each training seeker, float64; 0 for all where nothing is liked."""
        vector = np.zeros(self._vectors.shape[1])
        for feature, value in self.profile(liked).items():
            if feature in self._features:
                vector[self._features[feature]] = value
        return self._vectors @ vector


def chosen(values: np.ndarray, n: int) -> np.ndarray:
    """The n largest of `values` as they are, everything else 0; ties with the n-th are all kept."""
    if len(values) <= n:
        return values
    return np.where(
        values >= max(np.partition(values, -n)[-n], np.finfo(np.float64).tiny), values, 0.0
    )


class UserRetriever:
    """A retriever whose scores similar seekers' conversations add to."""

    def __init__(
        self,
        documents: Retriever,
        dialogues: Sequence[Dialogue],
        movies: Mapping[str, Movie],
        bm25: BM25Config,
        config: UserConfig,
    ) -> None:
        require(bool(dialogues), "There are no training conversations to choose from.")
        self.documents, self.config = documents, config
        tokenizer: Tokenizer = documents.tokenizer
        self.profiles = Profiles(
            [known_likes(dialogue) for dialogue in dialogues], movies, config.genre
        )
        self.index = Index([tokenizer.turns(dialogue.turns) for dialogue in dialogues], bm25)
        position = {movie: i for i, movie in enumerate(movies)}
        pairs = [
            (position[m], row)
            for row, d in enumerate(dialogues)
            for m in {m for t in d.turns for m in t.movies}
            if m in position
        ]
        items, rows = np.array(sorted(pairs), int).reshape(-1, 2).T
        self._mentions = scipy.sparse.csr_array(
            (np.ones(len(items)), (items, rows)), shape=(len(movies), len(dialogues))
        )

    def scores(self, case: Case) -> np.ndarray:
        scores = self.documents.scores(case)
        tokens = query_tokens(case, self.documents.query, self.documents.tokenizer)
        weights = self.weights(likes(case.context))
        each = chosen(self.index.scores(tokens, weights), self.config.neighbours)
        return scores + self.config.weight * (self._mentions @ each)

    def weights(self, liked: Sequence[str]) -> np.ndarray:
        """What each training conversation weighs for a seeker, in [0, 1]."""
        alike = self.profiles.similarity(liked) if self.config.alike else np.zeros(self.profiles.n)
        largest = alike.max()
        return (1 - self.config.alike) + self.config.alike * (
            alike / largest if largest > 0 else alike
        )
