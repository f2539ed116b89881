"""Taskmaster coffee ordering (TM-4) and movie ticketing (TM-3): turns with a thumbs up or down.

Released with PERL (arXiv 2403.10704, version 1) at github google-research-datasets/Taskmaster,
CC BY 4.0. A reward row is a context, a generated agent turn and a reward of 0 or 1.

Rows of one dialogue share its first user turn (`dialogue.group_of`), which is their `group`; a hash
of that puts them in one part: train 47 %, judge 23 %, validation 10 %, test 20 % of the groups.
`judge` rows (labels and comparisons) are for the reward model that judges win rates: it must not
have been trained on what trained the reward model under study. Prompts, and demonstrations and
corpus of whole dialogues, use train and judge together.

Comparisons are natural: one up-rated and one down-rated response to the same context.
Demonstrations are every agent turn, text or call, of the TM-4 dialogues, after the greeting that
nearly all reward rows open with. For ticketing they come from `TM-3-2020/data` when the local copy
has it; otherwise they are the up-rated generations of the reward rows (of the train part for
training), and the corpus is the contexts of those rows that no other context extends.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import ClassVar

from perl_jax.data import dialogue, store
from perl_jax.data.store import SPLITS, DataOptions, RowsBuilder
from perl_jax.data.upstream import fetch, local_files, read_lists
from perl_jax.errors import UserError, require
from perl_jax.runtime.files import file_hash

COMMIT = "d92cb6af3005f1dc09c39e75e7daf4a04905e00b"
BASE_URL = f"https://raw.githubusercontent.com/google-research-datasets/Taskmaster/{COMMIT}"
PERCENTILES = {"train": (0, 47), "judge": (47, 70), "validation": (70, 80), "test": (80, 100)}
JUDGED = (*SPLITS, "judge")
KIND_SPLITS = {
    "labels": JUDGED,
    "comparisons": JUDGED,
    "prompts": SPLITS,
    "demonstrations": SPLITS,
    "corpus": SPLITS,
}


@dataclasses.dataclass(frozen=True)
class Rated:
    """One reward row, rendered. group: equal for all rows that may be of one dialogue."""

    group: str
    context: str
    response: str
    label: float

    @property
    def prompt(self) -> str:
        """The dialogue before the response, and the words that call for one."""
        return self.context + dialogue.CUE


def part_of(group: str) -> str:
    """The part of a group of dialogues."""
    return store.part_of(group, PERCENTILES)


def parts(split: str, *, judged: bool) -> tuple[str, ...]:
    """The parts that make up a split; without a judge's split of its own, train includes it."""
    return ("train", "judge") if split == "train" and not judged else (split,)


def read_turns(row: Mapping, field: str, index: int) -> list[dialogue.Turn]:
    """A reward row's JSON string field as turns. UserError that names the row."""
    try:
        value = json.loads(row[field])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"Reward row {index} has no valid JSON in its {field}: {error}.") from error
    turns = value if isinstance(value, list) else [value]
    good = all(
        isinstance(turn, dict) and "role" in turn and {"text", "api", "response"} & set(turn)
        for turn in turns
    )
    require(
        good,
        f"Reward row {index} has a turn in its {field} without a role, or without text, api or "
        "response.",
    )
    return turns


def rated_rows(rows: Iterable[Mapping]) -> Iterator[Rated]:
    """Reward rows, rendered, in upstream's order."""
    for index, row in enumerate(rows):
        context, generation = (
            read_turns(row, "context", index),
            read_turns(row, "generation", index),
        )
        label = row.get("reward")
        require(label in (0, 1), f"Reward row {index} has the reward {label!r}; it must be 0 or 1.")
        yield Rated(
            dialogue.group_of(context),
            dialogue.rendered(context),
            dialogue.said(generation[0]),
            float(label),
        )


def comparisons(rows: Iterable[Rated]) -> Iterator[dict]:
    """Every pair of an up-rated and a down-rated response, of different text, to one context."""
    by_context: dict[str, tuple[dict, dict]] = {}
    groups: dict[str, str] = {}
    for row in rows:
        by_context.setdefault(row.prompt, ({}, {}))[int(row.label)].setdefault(row.response)
        groups[row.prompt] = row.group
    for prompt, (down, up) in by_context.items():
        for chosen in up:
            for rejected in down:
                if chosen != rejected:
                    yield {
                        "prompt": prompt,
                        "chosen": chosen,
                        "rejected": rejected,
                        "group": groups[prompt],
                    }


def unextended(contexts: Iterable[str]) -> Iterator[str]:
    """The different contexts that are not the beginning of another, sorted."""
    ordered = sorted({context for context in contexts if context})
    for context, following in zip(ordered, [*ordered[1:], ""], strict=True):
        if not following.startswith(context):
            yield context


def greeting_of(reward_rows: Iterable[Mapping]) -> list[dialogue.Turn]:
    """The agent's turn that most reward rows open with: the dialogues lack it."""
    contexts = [read_turns(row, "context", index) for index, row in enumerate(reward_rows)]
    openings = [
        context[0].get("text") for context in contexts if context and context[0]["role"] == "agent"
    ]
    counted = collections.Counter(text for text in openings if text).most_common(1)
    return [{"role": "agent", "text": text} for text, _ in counted]


def dialogues(
    conversations: Iterable[Mapping],
    read: Callable[[Sequence[Mapping]], list],
    greeting: list[dialogue.Turn],
) -> Iterator[list[dialogue.Turn]]:
    """Dialogues as turns behind the greeting; those with broken annotations are left out."""
    for conversation in conversations:
        try:
            turns = read(conversation["utterances"])
        except (KeyError, TypeError, ValueError):
            continue
        yield turns if turns and turns[0]["role"] == "agent" else [*greeting, *turns]


class TaskmasterBuilder(RowsBuilder, skip_registration=True):
    """What the two tasks share. reward_folder, data_folder: upstream's; read: a dialogue's
    reader.
    """

    sources = ("taskmaster.py", "dialogue.py", "upstream.py")
    folder: ClassVar[str]
    reward_count: ClassVar[int]
    # Dialogue files to download; 0: dialogues are used only from a local copy that has them.
    data_count: ClassVar[int]
    read: ClassVar[Callable]

    @classmethod
    def kind_splits(cls) -> dict[str, tuple[str, ...]]:
        """Returns the splits of each kind of rows."""
        return KIND_SPLITS

    @classmethod
    def files(cls, options: DataOptions, what: str, base_url: str = BASE_URL) -> list[pathlib.Path]:
        """Upstream's `reward` or `data` files; none for dialogues that are not to be had."""
        folder = f"{cls.folder}/{what}"
        if options.data_dir is not None:
            optional = what == "data" and not cls.data_count
            absent = not (pathlib.Path(options.data_dir).expanduser() / folder).is_dir()
            return [] if optional and absent else local_files(options.data_dir, folder)
        count = cls.reward_count if what == "reward" else cls.data_count
        cached = options.cache_path / "downloads" / f"taskmaster-{COMMIT[:7]}"
        return [
            fetch(base_url, f"{folder}/{what}_{index:02}.json", cached) for index in range(count)
        ]

    @classmethod
    def kind_files(
        cls, kind: str, options: DataOptions
    ) -> tuple[list[pathlib.Path], list[pathlib.Path]]:
        """(reward files, dialogue files) that a kind is made from."""
        whole = kind in ("demonstrations", "corpus")
        return cls.files(options, "reward"), cls.files(options, "data") if whole else []

    @classmethod
    def content(cls, kind: str, options: DataOptions) -> object:
        """Returns the hashes of the files that a kind of rows is made from."""
        return [[file_hash(path) for path in paths] for paths in cls.kind_files(kind, options)]

    @classmethod
    def rows(cls, kind: str, split: str, options: DataOptions) -> Iterator[dict]:
        """Returns the rows of a split, made from upstream's files."""
        reward_files, data_files = cls.kind_files(kind, options)
        reward_rows = read_lists(reward_files)
        if data_files:
            found = dialogues(read_lists(data_files), cls.read, greeting_of(reward_rows))
            wanted = parts(split, judged=False)
            chosen = (turns for turns in found if part_of(dialogue.group_of(turns)) in wanted)
            return demonstration_rows(chosen) if kind == "demonstrations" else corpus_rows(chosen)
        wanted = parts(split, judged=kind != "prompts")
        return REWARD_KINDS[kind](
            [row for row in rated_rows(reward_rows) if part_of(row.group) in wanted]
        )


def demonstration_rows(found: Iterable[list[dialogue.Turn]]) -> Iterator[dict]:
    """Yields every response of the assistant that is not empty, with the dialogue before it."""
    for turns in found:
        group = dialogue.group_of(turns)
        for prompt, response in dialogue.responses_of(turns):
            if response:
                yield {"prompt": prompt, "response": response, "group": group}


def corpus_rows(found: Iterable[list[dialogue.Turn]]) -> Iterator[dict]:
    """Returns each dialogue as one text."""
    return ({"text": dialogue.rendered(turns)} for turns in found)


def label_rows(rows: Iterable[Rated]) -> Iterator[dict]:
    """Returns each rated response with its label, 1 for thumbs up and 0 for thumbs down."""
    return (
        {"prompt": row.prompt, "response": row.response, "label": row.label, "group": row.group}
        for row in rows
    )


def prompt_rows(rows: Iterable[Rated]) -> Iterator[dict]:
    """Each different context once."""
    groups = {row.prompt: row.group for row in rows}
    return ({"prompt": prompt, "group": group} for prompt, group in groups.items())


def up_rated_rows(rows: Iterable[Rated]) -> Iterator[dict]:
    """Returns the responses with thumbs up."""
    return (
        {"prompt": row.prompt, "response": row.response, "group": row.group}
        for row in rows
        if row.label == 1
    )


def context_rows(rows: Iterable[Rated]) -> Iterator[dict]:
    """Returns each context that no other one continues, as a text."""
    return ({"text": context} for context in unextended(row.context for row in rows))


REWARD_KINDS = {
    "labels": label_rows,
    "comparisons": comparisons,
    "prompts": prompt_rows,
    "demonstrations": up_rated_rows,
    "corpus": context_rows,
}


class CoffeeBuilder(TaskmasterBuilder):
    """TM-4: 3,228 rated turns (86 % up) and 3,710 dialogues."""

    name = "taskmaster_coffee"
    folder, reward_count, data_count = "TM-4-2024", 7, 8
    read = staticmethod(dialogue.turns_of_tm4)


class TicketingBuilder(TaskmasterBuilder):
    """TM-3: 3,667 rated turns (16 % up); dialogues from a local copy only."""

    name = "taskmaster_ticketing"
    folder, reward_count, data_count = "TM-3-2020", 8, 0
    read = staticmethod(dialogue.turns_of_tm3)


class BothBuilder(RowsBuilder):
    """The corpora of both, coffee's rows first: text for a base, as ticketing's reward rows alone
    give too few (138).
    """

    name = "taskmaster"
    sources = TaskmasterBuilder.sources
    tasks: ClassVar = (CoffeeBuilder, TicketingBuilder)

    @classmethod
    def kind_splits(cls) -> dict[str, tuple[str, ...]]:
        """Returns the splits of each kind of rows."""
        return {"corpus": KIND_SPLITS["corpus"]}

    @classmethod
    def content(cls, kind: str, options: DataOptions) -> object:
        """Returns the hashes of the files that a kind of rows is made from."""
        return [task.content(kind, options) for task in cls.tasks]

    @classmethod
    def rows(cls, kind: str, split: str, options: DataOptions) -> Iterator[dict]:
        """Returns the rows of a split, made from upstream's files."""
        return itertools.chain.from_iterable(task.rows(kind, split, options) for task in cls.tasks)
