"""The registry of tasks: where rows of each kind come from, and the gold reward where one is
known.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np

from perl_jax.data.jsonl import JsonlBuilder
from perl_jax.data.orders import OrdersBuilder, gold_rewards
from perl_jax.data.store import DataOptions, RowsBuilder, RowSource, open_rows
from perl_jax.data.taskmaster import BothBuilder, CoffeeBuilder, TicketingBuilder
from perl_jax.errors import one_of

__all__ = ["TASKS", "DataOptions", "Task", "get_task"]


@dataclasses.dataclass(frozen=True)
class Task:
    """A source of rows.

    open(kind, split, options) -> RowSource: random access to rows, prepared on first use.
    content(kind, options): a JSON value that determines the rows: seeds, sizes, hashes of files.
    place(kind, split, options, index): where a message says that a row is.
    gold(prompts, responses) -> float32 rewards; None where the true reward is not known.
    splits: the splits that each kind has (`judge`: comparisons and labels kept for a judge).
    """

    name: str
    description: str
    kinds: tuple[str, ...]
    open: Callable[[str, str, DataOptions], RowSource]
    content: Callable[[str, DataOptions], object]
    place: Callable[[str, str, DataOptions, int], str]
    gold: Callable[[Sequence[str], Sequence[str]], np.ndarray] | None
    splits: dict[str, tuple[str, ...]]


def task_of(builder: type[RowsBuilder], description: str, gold: Callable | None = None) -> Task:
    splits = dict(builder.kind_splits())
    return Task(
        builder.name,
        description,
        tuple(splits),
        functools.partial(open_rows, builder),
        builder.content,
        builder.place,
        gold,
        splits,
    )


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        task_of(
            OrdersBuilder,
            "Embedded: structured coffee orders, simulated raters, known reward.",
            gold_rewards,
        ),
        task_of(
            CoffeeBuilder, "Taskmaster TM-4: coffee ordering, thumbs up or down on single turns."
        ),
        task_of(
            TicketingBuilder, "Taskmaster TM-3: movie ticketing, thumbs up or down on single turns."
        ),
        task_of(BothBuilder, "Taskmaster TM-4 and TM-3: the corpora of both, to train a base on."),
        task_of(
            JsonlBuilder, "Your own rows: a JSON Lines file, or a folder with one for each split."
        ),
    )
}


def get_task(name: str) -> Task:
    """The task of that name; UserError that lists the known ones otherwise."""
    one_of("task", name, TASKS)
    return TASKS[name]
