"""ReDial as cases: dialogues read from upstream's files, who said what, what was recommended next.

ReDial: Li et al. 2018, arXiv 1812.07617 (CC BY 4.0). A case follows the protocol of KBRD (Chen et
al. 2019) and UniCRS (Wang et al. 2022): messages of one speaker in a row are one turn, and every
turn of the recommender that mentions movies is to be predicted from the turns before it. Each movie
of the turn is a target of its own. Nothing after the turn, and no form (filled in when the dialogue
was over), is part of a case.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re
import tempfile
import zipfile
from collections.abc import Iterable, Mapping, Sequence

from perl_jax.data.store import cache_folder
from perl_jax.data.upstream import fetch
from perl_jax.errors import UserError, require
from perl_jax.runtime.files import read_json

MENTION = re.compile(r"@(\d+)")
# A folder may hold any of these; train_data is the whole train split, the others are parts of it.
TRAIN_FILES = ("train_data.jsonl", "kgsf_valid_data.jsonl", "valid_data.jsonl")
TEST_FILE, MOVIES_FILE = "test_data.jsonl", "id2info.json"
DIALOGUES_URL = "https://github.com/ReDialData/website/raw/849e9eb1bb60e312f8bf4daa82fc10a285e9318b"
ARCHIVE = "redial_dataset.zip"
MOVIES_URL = "https://github.com/RUCAIBox/iEvaLM-CRS/raw/162e2f4/data/redial"


@dataclasses.dataclass(frozen=True)
class Turn:
    """Messages of one speaker in a row. text: movies as @id; movies: their ids, in order, each
    once.
    """

    seeker: bool
    text: str
    movies: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Label:
    """A form's answer about one movie: who brought it up, and whether the seeker liked it (None:
    not said).
    """

    suggested: bool
    liked: bool | None


@dataclasses.dataclass(frozen=True)
class Dialogue:
    """One conversation. names: titles of the mentioned movies; labels: the seeker's form, else the
    recommender's.
    """

    id: str
    workers: frozenset[int]
    turns: tuple[Turn, ...]
    names: Mapping[str, str]
    labels: Mapping[str, Label]


@dataclasses.dataclass(frozen=True)
class Movie:
    """What is known of a movie beforehand; a title alone where only train dialogues mention it."""

    id: str
    title: str
    year: str = ""
    genres: tuple[str, ...] = ()
    directors: tuple[str, ...] = ()
    cast: tuple[str, ...] = ()
    plot: str = ""


@dataclasses.dataclass(frozen=True)
class Case:
    """What is to be predicted: the movies of the recommender's turn number `turn`, from the turns
    before.
    """

    dialogue: str
    turn: int
    context: tuple[Turn, ...]
    targets: tuple[str, ...]

    @property
    def mentioned(self) -> tuple[str, ...]:
        """Movies of the context, the latest first, each once."""
        return tuple(
            dict.fromkeys(
                movie for turn in reversed(self.context) for movie in reversed(turn.movies)
            )
        )

    @property
    def introduced(self) -> tuple[str, ...]:
        """The same movies in the order in which they first came up."""
        return tuple(dict.fromkeys(movie for turn in self.context for movie in turn.movies))


@dataclasses.dataclass(frozen=True)
class ReDial:
    """Train side and test side. repeated: dialogues of the train side that were left out as
    copies.
    """

    train: tuple[Dialogue, ...]
    test: tuple[Dialogue, ...]
    movies: Mapping[str, Movie]
    files: tuple[str, ...]
    repeated: int


def turns_of(messages: Sequence[Mapping], seeker: int) -> tuple[Turn, ...]:
    """Messages of one speaker in a row joined by a space."""
    parts: list[tuple[bool, list[str]]] = []
    for message in messages:
        is_seeker = message["senderWorkerId"] == seeker
        if not parts or parts[-1][0] != is_seeker:
            parts.append((is_seeker, []))
        parts[-1][1].append(message["text"])
    joined = ((is_seeker, " ".join(texts)) for is_seeker, texts in parts)
    return tuple(
        Turn(is_seeker, text, tuple(dict.fromkeys(MENTION.findall(text))))
        for is_seeker, text in joined
    )


def labels_of(row: Mapping) -> dict[str, Label]:
    """The seeker's form; where it says nothing of a movie (or is empty, upstream's []), the
    recommender's.
    """
    answers = {**(row["respondentQuestions"] or {}), **(row["initiatorQuestions"] or {})}
    said = {0: False, 1: True}
    return {
        movie: Label(bool(a.get("suggested")), said.get(a.get("liked")))
        for movie, a in answers.items()
    }


def parse_dialogue(line: str, where: str) -> Dialogue:
    """One line of a file; UserError that opens with `where`."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON ({error}).") from error
    try:
        seeker = row["initiatorWorkerId"]
        names = {
            movie: " ".join(name.split())
            for movie, name in (row["movieMentions"] or {}).items()
            if name
        }
        workers = frozenset((seeker, row["respondentWorkerId"]))
        return Dialogue(
            str(row["conversationId"]),
            workers,
            turns_of(row["messages"], seeker),
            names,
            labels_of(row),
        )
    except KeyError as error:
        raise UserError(
            f"{where}: the field {error.args[0]} is missing; it must be a ReDial dialogue."
        ) from error
    except (TypeError, AttributeError) as error:
        raise UserError(f"{where}: not a ReDial dialogue ({error}).") from error


def read_dialogues(path: pathlib.Path) -> list[Dialogue]:
    """A file's dialogues, in order. UserError naming file and line."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}).") from error
    found = [
        parse_dialogue(line, f"{path}, line {number}")
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    require(bool(found), f"{path} is empty; it must hold one dialogue a line.")
    return found


def read_movies(path: pathlib.Path) -> dict[str, Movie]:
    """Metadata by movie id. UserError naming the movie that cannot be read."""
    value = read_json(path)
    require(
        isinstance(value, dict),
        f"{path} must hold one JSON object, from movie ids to what is known of them.",
    )
    movies = {}
    for movie, row in value.items():
        good = isinstance(row, dict) and isinstance(row.get("name"), str) and row["name"].strip()
        require(bool(good), f"{path}: the movie {movie} has no name.")
        title, year = split_title(row["name"])
        lists = [tuple(row.get(field) or ()) for field in ("genre", "director", "star")]
        movies[movie] = Movie(movie, title, year, *lists, plot=row.get("plot") or "")
    return movies


def split_title(name: str) -> tuple[str, str]:
    """("The Shining", "1980") of "The Shining  (1980)"; no year: ""."""
    name = " ".join(name.split())
    found = re.fullmatch(r"(.+?) ?\((\d{4})\)", name)
    return (found[1], found[2]) if found else (name, "")


def content_of(dialogue: Dialogue) -> str:
    """What was said, whatever the case, punctuation and cut into messages: equal for copies of a
    dialogue.
    """
    return " ".join(re.findall(r"\w+", " ".join(turn.text for turn in dialogue.turns).lower()))


def without_copies(dialogues: Iterable[Dialogue], test: Iterable[Dialogue]) -> list[Dialogue]:
    """Those whose id and content occur neither before nor in the test side; in the order of their
    ids.
    """
    test = list(test)
    ids, contents = {d.id for d in test}, {content_of(d) for d in test}
    kept = []
    for dialogue in dialogues:
        content = content_of(dialogue)
        if dialogue.id not in ids and content not in contents:
            kept.append(dialogue)
            ids.add(dialogue.id)
            contents.add(content)
    return sorted(kept, key=lambda d: (len(d.id), d.id))


def download(
    folder: pathlib.Path, dialogues_url: str = DIALOGUES_URL, movies_url: str = MOVIES_URL
) -> pathlib.Path:
    """The folder with upstream's files, fetched once: both splits whole, and the movies."""
    fetch(movies_url, MOVIES_FILE, folder)
    archive = fetch(dialogues_url, ARCHIVE, folder)
    for name in (TRAIN_FILES[0], TEST_FILE):
        if not (folder / name).exists():
            try:
                body = zipfile.ZipFile(archive).read(name)
            except KeyError as error:
                raise UserError(
                    f"{archive} holds no {name}; give a local copy with --data-dir."
                ) from error
            handle, temporary = tempfile.mkstemp(prefix=".part-", dir=folder)
            with os.fdopen(handle, "wb") as file:
                file.write(body)
            os.replace(temporary, folder / name)
    return folder


def read_redial(data_dir: str | None) -> ReDial:
    """Everything, from a local copy or (None) downloaded. UserError for what is missing or cannot
    be read.
    """
    if data_dir is None:
        folder = download(cache_folder() / "redial-849e9eb")
    else:
        folder = pathlib.Path(data_dir).expanduser()
        require(
            folder.is_dir(),
            f"There is no folder {folder}; --data-dir must hold {TEST_FILE}, {MOVIES_FILE} and "
            "train dialogues.",
        )
    for name in (TEST_FILE, MOVIES_FILE):
        require((folder / name).is_file(), f"There is no {name} in {folder}.")
    present = [name for name in TRAIN_FILES if (folder / name).is_file()]
    require(
        bool(present),
        f"There are no train dialogues in {folder}; it must hold one of {', '.join(TRAIN_FILES)}.",
    )
    test = read_dialogues(folder / TEST_FILE)
    read = [dialogue for name in present for dialogue in read_dialogues(folder / name)]
    train = without_copies(read, test)
    require(bool(train), f"Every train dialogue in {folder} is in {TEST_FILE} too.")
    return ReDial(
        tuple(train),
        tuple(test),
        catalogue(read_movies(folder / MOVIES_FILE), train),
        tuple(present),
        len(read) - len(train),
    )


def catalogue(movies: Mapping[str, Movie], train: Iterable[Dialogue]) -> dict[str, Movie]:
    """All movies that can be recommended: those with metadata, and those that train dialogues name.

    What only a test dialogue names is not in it: a case with such a target stays, and is a miss.
    """
    found = dict(movies)
    for dialogue in train:
        for turn in dialogue.turns:
            for movie in turn.movies:
                if movie not in found and movie in dialogue.names:
                    found[movie] = Movie(movie, *split_title(dialogue.names[movie]))
    return dict(sorted(found.items(), key=lambda item: (len(item[0]), item[0])))


def cases_of(dialogue: Dialogue) -> list[Case]:
    """One for each turn of the recommender that mentions a movie, whether new or mentioned
    before.
    """
    return [
        Case(dialogue.id, index, dialogue.turns[:index], turn.movies)
        for index, turn in enumerate(dialogue.turns)
        if not turn.seeker and turn.movies
    ]


def split_validation(
    train: Sequence[Dialogue], share: float = 0.15
) -> tuple[list[Dialogue], list[Dialogue]]:
    """(fit, validation): as between ReDial's own train and test, validation is later and its
    workers are not in fit.

    Ids grow with time. Earlier dialogues of validation's workers are in neither part.
    """
    cut = len(train) - max(1, round(share * len(train)))
    validation = list(train[cut:])
    workers = frozenset().union(*(dialogue.workers for dialogue in validation))
    fit = [dialogue for dialogue in train[:cut] if not dialogue.workers & workers]
    require(
        bool(fit),
        f"Of {len(train)} train dialogues none is left to fit on when {len(validation)} are for "
        "validation.",
    )
    return fit, validation
