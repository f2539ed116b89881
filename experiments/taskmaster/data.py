"""The Taskmaster tasks: coffee ordering (TM-4) and movie ticketing (TM-3), rated turn by turn.

The data was released with PERL (arXiv 2403.10704, version 1) at github
google-research-datasets/Taskmaster under CC BY 4.0. A reward row is a context, a generated agent
turn and a reward: 1 for a thumbs up, 0 for a thumbs down.

The rows of one dialogue share its first user turn (`dialogue.group_of`), which is their `group`. A
hash of the group puts them into one part: train has 47 % of the groups, judge 23 %, validation 10 %
and test 20 %. The `judge` rows (labels and comparisons) train the reward model that decides win
rates, which must not have seen the rows of the reward model under study. The train split of
prompts, and of demonstrations and corpus made from whole dialogues, is the parts train and judge
together.

A comparison is one up-rated and one down-rated response to the same context. Demonstrations are all
agent turns, text or call, of the TM-4 dialogues; dialogues begin with the greeting that nearly all
reward rows begin with. Demonstrations of ticketing come from `TM-3-2020/data` if the local copy has
that folder. Otherwise they are the up-rated responses of the reward rows, and the corpus is the
contexts of these rows that are not the beginning of another context.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import ClassVar

from perl_jax.data import store, upstream
from perl_jax.data.config import DataConfig
from perl_jax.data.store import SPLITS, RowsBuilder
from perl_jax.data.tasks import PreparedTask
from perl_jax.data.upstream import fetch, local_files, read_lists
from perl_jax.errors import UserError, require
from perl_jax.runtime.files import file_hash

from . import dialogue

COMMIT = "d92cb6af3005f1dc09c39e75e7daf4a04905e00b"
BASE_URL = f"https://raw.githubusercontent.com/google-research-datasets/Taskmaster/{COMMIT}"
# The percentiles of hashes that make up each part.
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
    """A rendered reward row.

    Attributes:
        group: Equal for all rows that may be of one dialogue.
        context: The turns before the response.
        response: The rated agent turn, on one line.
        label: 1 for a thumbs up, 0 for a thumbs down.
    """

    group: str
    context: str
    response: str
    label: float

    @property
    def prompt(self) -> str:
        """The context, followed by the cue for the agent."""
        return self.context + dialogue.CUE


def part_of(group: str) -> str:
    """Returns the part that a group's rows are in: train, judge, validation or test."""
    return store.part_of(group, PERCENTILES)


def parts(split: str, *, judged: bool) -> tuple[str, ...]:
    """Returns the parts that make up a split.

    Args:
        split: The split.
        judged: Whether the kind of rows has a split `judge`; without one, train includes that part.
    """
    return ("train", "judge") if split == "train" and not judged else (split,)


def read_turns(row: Mapping, field: str, index: int) -> list[dialogue.Turn]:
    """Returns the turns in a JSON text field of a reward row.

    Args:
        row: The reward row.
        field: context or generation.
        index: The row's number, for messages.

    Raises:
        UserError: The field is not JSON, or a turn in it lacks a role or content.
    """
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
    """Yields the reward rows as `Rated`, in upstream's order; raises UserError for a row that
    cannot be read or whose reward is not 0 or 1.
    """
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
    """Yields a row for each pair of an up-rated and a different down-rated response to one context.

    Its keys are `prompt`, `chosen`, `rejected` and `group`.
    """
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
    """Yields the distinct contexts that no other context begins with, sorted; empty ones are
    left out.
    """
    ordered = sorted({context for context in contexts if context})
    for context, following in zip(ordered, [*ordered[1:], ""], strict=True):
        if not following.startswith(context):
            yield context


def greeting_of(reward_rows: Iterable[Mapping]) -> list[dialogue.Turn]:
    """Returns the agent turn that most reward rows begin with, in a list; [] if none begins with an
    agent's text.

    The dialogues do not have this greeting.

    Args:
        reward_rows: The reward rows as upstream has them.
    """
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
    """Yields the turns of each dialogue, with the greeting first if the agent does not begin.

    Dialogues with annotations that cannot be read are left out.

    Args:
        conversations: The dialogues as upstream has them, with the key `utterances`.
        read: Turns utterances into turns.
        greeting: The turns of the greeting.
    """
    for conversation in conversations:
        try:
            turns = read(conversation["utterances"])
        except (KeyError, TypeError, ValueError):
            continue
        yield turns if turns and turns[0]["role"] == "agent" else [*greeting, *turns]


class TaskmasterBuilder(RowsBuilder):
    """Base class of the two Taskmaster tasks.

    Attributes:
        folder: Upstream's folder.
        reward_count: How many files of reward rows upstream has.
        data_count: How many files of dialogues to download; 0: dialogues are only read from a local
            copy that has them.
        read: Turns the utterances of a dialogue into turns.
    """

    sources = (dialogue, upstream)
    folder: ClassVar[str]
    reward_count: ClassVar[int]
    data_count: ClassVar[int]
    read: ClassVar[Callable]

    @classmethod
    def kind_splits(cls) -> dict[str, tuple[str, ...]]:
        """Returns the splits of each kind of rows, `KIND_SPLITS`."""
        return KIND_SPLITS

    @classmethod
    def files(cls, config: DataConfig, what: str, base_url: str = BASE_URL) -> list[pathlib.Path]:
        """Returns the files of upstream's folder `reward` or `data`, downloaded if necessary.

        Returns [] for dialogues that are neither downloaded nor in the local copy.

        Args:
            config: `data_dir` names a local copy of upstream's repository; None downloads into the
                cache.
            what: reward (reward rows) or data (dialogues).
            base_url: The address of upstream's repository.
        """
        folder = f"{cls.folder}/{what}"
        if config.data_dir is not None:
            optional = what == "data" and not cls.data_count
            absent = not (pathlib.Path(config.data_dir).expanduser() / folder).is_dir()
            return [] if optional and absent else local_files(config.data_dir, folder)
        count = cls.reward_count if what == "reward" else cls.data_count
        cached = store.cache_folder() / "downloads" / f"taskmaster-{COMMIT[:7]}"
        return [
            fetch(base_url, f"{folder}/{what}_{index:02}.json", cached) for index in range(count)
        ]

    @classmethod
    def kind_files(
        cls, kind: str, config: DataConfig
    ) -> tuple[list[pathlib.Path], list[pathlib.Path]]:
        """Returns (files of reward rows, files of dialogues) that a kind of rows is made from.

        Only demonstrations and corpus are made from dialogues; the second list is [] for other
        kinds.
        """
        whole = kind in ("demonstrations", "corpus")
        return cls.files(config, "reward"), cls.files(config, "data") if whole else []

    @classmethod
    def content(cls, kind: str, config: DataConfig) -> object:
        """Returns the hashes of the files that a kind of rows is made from: [reward rows,
        dialogues].
        """
        return [[file_hash(path) for path in paths] for paths in cls.kind_files(kind, config)]

    @classmethod
    def rows(cls, kind: str, split: str, config: DataConfig) -> Iterator[dict]:
        """Returns an iterator over the rows of a split.

        Demonstrations and corpus are made from dialogues if there are files of them, else from
        reward rows; all other kinds from reward rows.

        Args:
            kind: A key of `KIND_SPLITS`.
            split: A split of that kind.
            config: `data_dir` names a local copy of upstream's repository; None downloads the
                files.
        """
        reward_files, data_files = cls.kind_files(kind, config)
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
    """Yields a row (`prompt`, `response`, `group`) for each agent turn that is not empty, after the
    first user turn.

    Args:
        found: The turns of each dialogue.
    """
    for turns in found:
        group = dialogue.group_of(turns)
        for prompt, response in dialogue.responses_of(turns):
            if response:
                yield {"prompt": prompt, "response": response, "group": group}


def corpus_rows(found: Iterable[list[dialogue.Turn]]) -> Iterator[dict]:
    """Yields a row (`text`) for each dialogue.

    Args:
        found: The turns of each dialogue.
    """
    return ({"text": dialogue.rendered(turns)} for turns in found)


def label_rows(rows: Iterable[Rated]) -> Iterator[dict]:
    """Yields a row (`prompt`, `response`, `label`, `group`) for each rated response."""
    return (
        {"prompt": row.prompt, "response": row.response, "label": row.label, "group": row.group}
        for row in rows
    )


def prompt_rows(rows: Iterable[Rated]) -> Iterator[dict]:
    """Yields a row (`prompt`, `group`) for each distinct context."""
    groups = {row.prompt: row.group for row in rows}
    return ({"prompt": prompt, "group": group} for prompt, group in groups.items())


def up_rated_rows(rows: Iterable[Rated]) -> Iterator[dict]:
    """Yields a demonstration (`prompt`, `response`, `group`) for each up-rated response."""
    return (
        {"prompt": row.prompt, "response": row.response, "group": row.group}
        for row in rows
        if row.label == 1
    )


def context_rows(rows: Iterable[Rated]) -> Iterator[dict]:
    """Yields a row (`text`) for each context that no other context begins with."""
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
    """The corpora of both tasks, coffee's rows first, to train a base on.

    Ticketing alone has too few rows for that: its reward rows make a corpus of 138.
    """

    name = "taskmaster"
    sources = TaskmasterBuilder.sources
    tasks: ClassVar = (CoffeeBuilder, TicketingBuilder)

    @classmethod
    def kind_splits(cls) -> dict[str, tuple[str, ...]]:
        """Returns {"corpus": splits}: the task has no other kind of rows."""
        return {"corpus": KIND_SPLITS["corpus"]}

    @classmethod
    def content(cls, kind: str, config: DataConfig) -> object:
        """Returns `TaskmasterBuilder.content` of each of the two tasks, in a list."""
        return [task.content(kind, config) for task in cls.tasks]

    @classmethod
    def rows(cls, kind: str, split: str, config: DataConfig) -> Iterator[dict]:
        """Returns an iterator over the rows of a split of coffee's corpus, then of ticketing's."""
        return itertools.chain.from_iterable(task.rows(kind, split, config) for task in cls.tasks)


# `--data.task experiments/taskmaster/data.py:COFFEE`, and so on.
COFFEE, TICKETING, BOTH = (
    PreparedTask(builder, options=("data_dir",))
    for builder in (CoffeeBuilder, TicketingBuilder, BothBuilder)
)
