"""Conversations as text for a language model: prompts to rewrite them into queries, and to write
them for a movie.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from augment import Linker
from documents import Passage
from redial import MENTION, Case, Movie, Turn
from users import likes

SPEAKERS = {True: "seeker", False: "recommender"}
CUE = "query:"
SHOWN_TURNS = 4
POINTER = re.compile(r"#(\d{1,4})")


def rendered(turns: Iterable[Turn], linker: Linker) -> str:
    """One line a turn, its speaker first, mentions as titles."""
    return "".join(
        f"{SPEAKERS[turn.seeker]}: {' '.join(linker.unlinked(turn.text).split())}\n"
        for turn in turns
    )


def parsed(text: str, linker: Linker) -> tuple[Turn, ...]:
    """Turns of such text, titles as mentions; lines without a speaker are left out."""
    speakers = {f"{name}:": seeker for seeker, name in SPEAKERS.items()}
    turns = []
    for line in text.splitlines():
        speaker, _, said = line.strip().partition(" ")
        if speaker in speakers and said.strip():
            linked = linker.linked(said)
            turns.append(
                Turn(speakers[speaker], linked, tuple(dict.fromkeys(MENTION.findall(linked))))
            )
    return tuple(turns)


def query_prompt(case: Case, linker: Linker) -> str:
    """The last turns of the conversation, then the cue; a conversation that has not begun is the
    cue alone.

    A movie has its number before its title, "#2 The Shining (1980)": the second that came up.
    """
    numbers = {movie: number for number, movie in enumerate(case.introduced, 1)}
    numbered = lambda text: MENTION.sub(lambda match: f"#{numbers[match[1]]} @{match[1]}", text)
    turns = (
        Turn(turn.seeker, numbered(turn.text), turn.movies) for turn in case.context[-SHOWN_TURNS:]
    )
    return rendered(turns, linker) + CUE


def pointed(query: str, introduced: Sequence[str]) -> str:
    """A query with #n as the mention of the n-th movie; a number without a movie is left as a
    word.
    """
    named = lambda match: (
        f"@{introduced[int(match[1]) - 1]}" if 0 < int(match[1]) <= len(introduced) else match[1]
    )
    return POINTER.sub(named, query)


def heuristic_query(case: Case, genres: frozenset[str]) -> str:
    """A rewriting without a model: the latest movies that the seeker likes, by number, and the
    genres that were named.

    Without either, the seeker's last words; a conversation that has not begun gets "good movie".
    """
    numbers = {movie: number for number, movie in enumerate(case.introduced, 1)}
    liked = [f"#{numbers[movie]}" for movie in likes(case.context)[-2:]]
    said = [
        word.strip(".,!?;")
        for turn in case.context
        for word in MENTION.sub(" ", turn.text).lower().split()
    ]
    named = [word for word in dict.fromkeys(said) if word in genres]
    parts = [*liked, *named[-3:]]
    if not parts:
        last = next((turn.text for turn in reversed(case.context) if turn.seeker), "")
        parts = [" ".join(MENTION.sub(" ", last).lower().split()[:8])]
    return " " + (" ".join(parts) if any(parts) else "good movie")


def writer_prompt(movie: Movie, neighbours: Sequence[str], linker: Linker) -> str:
    """What a language model is told of a movie that it shall write a conversation about."""
    lines = [f"movie: {linker.name(movie.id)}"]
    for name, values in (
        ("genre", movie.genres[:3]),
        ("with", movie.cast[:2]),
        ("like", [linker.name(other) for other in neighbours[:2]]),
    ):
        if values:
            lines.append(f"{name}: {', '.join(values)}")
    return "\n".join([*lines, "conversation:\n"])


def writer_example(
    passage: Passage, movies: Mapping[str, Movie], linker: Linker
) -> tuple[str, str]:
    """(prompt, response) of a real conversation: the movies that it names are those that the prompt
    says are like it.
    """
    turns = passage.turns[max(0, passage.at + 1 - SHOWN_TURNS) : passage.at + 1]
    named = [
        movie
        for turn in turns
        for movie in turn.movies
        if movie != passage.movie and movie in movies
    ]
    return writer_prompt(movies[passage.movie], list(dict.fromkeys(named)), linker), rendered(
        turns, linker
    )
