"""ReDial-shaped files of a few made-up dialogues."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence

SEEKER, RECOMMENDER = 1, 2

MOVIES = {
    "10": {
        "name": "Night Train (1999)",
        "genre": ["horror"],
        "director": ["Ada Moss"],
        "star": ["Bo Lind"],
        "plot": "A haunted sleeper.",
    },
    "11": {
        "name": "Dark Cellar (2001)",
        "genre": ["horror", "mystery"],
        "director": ["Ada Moss"],
        "star": ["Cy Orr"],
        "plot": "Doors close.",
    },
    "20": {
        "name": "Paper Hearts (2005)",
        "genre": ["romance"],
        "director": ["Di Paz"],
        "star": ["Ed Quill"],
        "plot": "Letters cross.",
    },
    "21": {
        "name": "Sunday Waltz (2010)",
        "genre": ["romance", "comedy"],
        "director": ["Di Paz"],
        "star": ["Flo Rey"],
        "plot": "A dance class.",
    },
    "30": {
        "name": "Iron Orbit (2015)",
        "genre": ["sci-fi"],
        "director": ["Gil Sand"],
        "star": ["Bo Lind"],
        "plot": "A lost station.",
    },
    "31": {"name": "Untold", "genre": [], "director": [], "star": [], "plot": None},
}


def message(worker: int, text: str) -> dict:
    return {"senderWorkerId": worker, "text": text, "timeOffset": 0, "messageId": 0}


def row(
    number: int,
    said: Sequence[tuple[str, str]],
    names: dict[str, str | None],
    liked: Sequence[str] = (),
    seeker: int = SEEKER,
    recommender: int = RECOMMENDER,
    suggested: Sequence[str] = (),
) -> dict:
    """A dialogue as upstream writes it; said: (s or r, text) in order."""
    workers = {"s": seeker, "r": recommender}
    form = {
        movie: {"suggested": int(movie in suggested), "seen": 1, "liked": int(movie in liked)}
        for movie in names
    }
    return {
        "conversationId": str(number),
        "initiatorWorkerId": seeker,
        "respondentWorkerId": recommender,
        "movieMentions": names,
        "messages": [message(workers[who], text) for who, text in said],
        "initiatorQuestions": form or [],
        "respondentQuestions": [],
    }


def pair(
    number: int,
    liked: str,
    recommended: str,
    words: str = "",
    seeker: int = SEEKER,
    recommender: int = RECOMMENDER,
) -> dict:
    """A seeker who likes one movie and is recommended another."""
    said = [
        ("s", f"Hello, I love @{liked}. {words}"),
        ("r", f"Then watch @{recommended} tonight"),
        ("s", "Thank you, bye"),
    ]
    names = {movie: MOVIES[movie]["name"] for movie in (liked, recommended)}
    return row(
        number,
        said,
        names,
        liked=(liked, recommended),
        seeker=seeker,
        recommender=recommender,
        suggested=(recommended,),
    )


def write_lines(path: pathlib.Path, rows: Sequence[dict]) -> None:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")


def write(
    folder: pathlib.Path, train: Sequence[dict], test: Sequence[dict], movies: dict = MOVIES
) -> pathlib.Path:
    """A folder that `read_redial` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    write_lines(folder / "valid_data.jsonl", train)
    write_lines(folder / "test_data.jsonl", test)
    (folder / "id2info.json").write_text(json.dumps(movies), encoding="utf-8")
    return folder


def small(folder: pathlib.Path, words: str = "", tens: int = 1) -> pathlib.Path:
    """Ten train dialogues (or several tens), horror goes with horror and romance with romance, and
    three test dialogues; words: said in the test ones.
    """
    horror, romance = ("10", "11"), ("20", "21")
    pairs = [
        horror,
        romance,
        romance,
        horror,
        horror,
        romance,
        romance,
        horror,
        horror,
        romance,
    ] * tens  # both in either half
    train = [
        pair(
            100 + i,
            *of,
            words=f"{'scary' if of[0] == '10' else 'sweet'} please, on evening {i}",
            seeker=1000 + i,
            recommender=2000 + i,
        )
        for i, of in enumerate(pairs)
    ]
    test = [
        pair(900, "10", "11", words, seeker=90, recommender=91),
        pair(901, "20", "21", words, seeker=92, recommender=93),
        pair(902, "20", "30", words, seeker=94, recommender=95),
    ]
    return write(folder, train, test)
