"""Test cases ranked by each system: one row a target, what it comes to, and what to read errors
from.

Three views of the same rankings:

- `all`: every movie of the recommender's turn is a target, the whole catalogue is ranked. What
  published numbers are made of.
- `new`: targets that the conversation had not mentioned yet, and movies that it had are taken out
  of
  the ranking. Repeating what was said earns nothing.
- `suggested`: those targets of `new` of which the form says that the recommender brought them up.

The unit is a target, as published; `turns` has the means over turns, whose targets are one
ranking's relevant items. Nothing is left out: a target that is not in the catalogue is a miss, and
a case without a context is ranked by popularity.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ranking import Summary, gain, measures, ranks_of, single_measures, summarise, tie_order, top
from redial import Case, Dialogue, Movie, cases_of
from systems import Recommender

from perl_jax.errors import require
from perl_jax.runtime.files import write_atomically

VIEWS = ("all", "new", "suggested")
# Training dialogues that mention the target: [low, high).
BUCKETS: dict[str, tuple[float, float]] = {
    "0": (0, 1),
    "1": (1, 2),
    "2-4": (2, 5),
    "5-9": (5, 10),
    "10-29": (10, 30),
    "30+": (30, math.inf),
}
SHOWN = 10


@dataclasses.dataclass(frozen=True)
class Target:
    """One movie to be predicted. count: training dialogues that mention it; suggested: by the form,
    None if it says nothing.
    """

    case: Case
    movie: str
    position: int | None
    mentioned: bool
    suggested: bool | None
    count: int

    def in_view(self, view: str) -> bool:
        return view == "all" or (not self.mentioned and (view == "new" or self.suggested is True))


def targets_of(
    dialogues: Sequence[Dialogue], position: Mapping[str, int], counts: np.ndarray
) -> list[Target]:
    """Every target of every case, in order."""
    found = []
    for dialogue in dialogues:
        for case in cases_of(dialogue):
            mentioned = set(case.mentioned)
            for movie in case.targets:
                label, place = dialogue.labels.get(movie), position.get(movie)
                suggested = None if label is None else label.suggested
                found.append(
                    Target(
                        case,
                        movie,
                        place,
                        movie in mentioned,
                        suggested,
                        0 if place is None else int(counts[place]),
                    )
                )
    require(bool(found), "There are no cases: no recommender's turn mentions a movie.")
    return found


@dataclasses.dataclass(frozen=True)
class Ranked:
    """A system's ranks of the targets, in order. new: NaN where the target was mentioned before.

    best: the first SHOWN of each case's `new` ranking, by the case's (dialogue, turn).
    """

    all: np.ndarray
    new: np.ndarray
    best: Mapping[tuple[str, int], tuple[int, ...]]
    seconds: float
    empty_queries: int

    @property
    def queries_per_second(self) -> float:
        return len(self.best) / self.seconds


def rank(system: Recommender, targets: Sequence[Target], position: Mapping[str, int]) -> Ranked:
    """Ranks every target; the time is that of scoring the catalogue, without the bookkeeping of
    ranks.
    """
    order, grouped = tie_order(len(position)), {}
    for index, target in enumerate(targets):
        grouped.setdefault((target.case.dialogue, target.case.turn), []).append(index)
    ranks, new, best, seconds = (
        np.full(len(targets), np.inf),
        np.full(len(targets), np.nan),
        {},
        0.0,
    )
    for key, members in grouped.items():
        case = targets[members[0]].case
        began = time.perf_counter()
        scores = system.scores(case)
        seconds += time.perf_counter() - began
        left_out = [position[movie] for movie in case.mentioned if movie in position]
        best[key] = tuple(int(i) for i in top(scores, SHOWN, order, left_out))
        known = [i for i in members if targets[i].position is not None]
        ranks[known] = ranks_of(scores, [targets[i].position for i in known], order)
        fresh = [i for i in members if not targets[i].mentioned]
        known = [i for i in fresh if targets[i].position is not None]
        new[fresh] = np.inf
        new[known] = ranks_of(scores, [targets[i].position for i in known], order, left_out)
    documents = getattr(system, "documents", system)
    return Ranked(ranks, new, best, seconds, getattr(documents, "empty_queries", 0))


def selected(targets: Sequence[Target], view: str, bucket: str | None = None) -> list[int]:
    """Indices of a view's targets, of one bucket of frequency where given."""
    low, high = (0, math.inf) if bucket is None else BUCKETS[bucket]
    return [
        i for i, target in enumerate(targets) if target.in_view(view) and low <= target.count < high
    ]


def rows_of(ranked: Ranked, view: str, indices: Sequence[int]) -> np.ndarray:
    """MEASURES of single targets, [targets, measures]."""
    return single_measures((ranked.all if view == "all" else ranked.new)[list(indices)])


def summary_of(
    ranked: Ranked, targets: Sequence[Target], view: str, bucket: str | None = None
) -> Summary | None:
    """A view's means and intervals; None where no target is in it."""
    indices = selected(targets, view, bucket)
    return (
        summarise(rows_of(ranked, view, indices), [targets[i].case.dialogue for i in indices])
        if indices
        else None
    )


def gain_of(
    ranked: Ranked, other: Ranked, targets: Sequence[Target], view: str, bucket: str | None = None
) -> Summary | None:
    """What a system has more than another on the same targets."""
    indices = selected(targets, view, bucket)
    dialogues = [targets[i].case.dialogue for i in indices]
    return (
        gain(rows_of(ranked, view, indices), rows_of(other, view, indices), dialogues)
        if indices
        else None
    )


def turns_summary(ranked: Ranked, targets: Sequence[Target], view: str) -> Summary | None:
    """The same with a turn as the unit: recall is the share of its targets, NDCG is of all of
    them.
    """
    grouped: dict[tuple[str, int], list[int]] = {}
    for i in selected(targets, view):
        grouped.setdefault((targets[i].case.dialogue, targets[i].case.turn), []).append(i)
    ranks = ranked.all if view == "all" else ranked.new
    rows = [measures(ranks[members]) for members in grouped.values()]
    return summarise(np.stack(rows), [dialogue for dialogue, _ in grouped]) if rows else None


def case_rows(
    ranked: Mapping[str, Ranked], targets: Sequence[Target], movies: Mapping[str, Movie]
) -> list[dict[str, Any]]:
    """One object a target: the conversation so far, the movie, every system's rank and first
    recommendations.
    """
    catalogue = list(movies.values())
    whole = lambda rank: int(rank) if np.isfinite(rank) else None
    name = lambda movie: f"{movie.title} ({movie.year})" if movie.year else movie.title
    rows = []
    for i, target in enumerate(targets):
        case = target.case
        systems = {
            system: {
                "rank": whole(one.all[i]),
                "rank_new": whole(one.new[i]),
                "first": [name(catalogue[j]) for j in one.best[case.dialogue, case.turn]],
            }
            for system, one in ranked.items()
        }
        rows.append(
            {
                "dialogue": case.dialogue,
                "turn": case.turn,
                "context": [
                    {"speaker": "seeker" if turn.seeker else "recommender", "text": turn.text}
                    for turn in case.context
                ],
                "target": target.movie,
                "title": name(movies[target.movie]) if target.movie in movies else None,
                "mentioned": target.mentioned,
                "suggested": target.suggested,
                "training_dialogues": target.count,
                "systems": systems,
            }
        )
    return rows


def write_rows(path: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
