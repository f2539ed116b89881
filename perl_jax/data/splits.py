"""The splits of a job's rows, looked at before anything is trained: are they there, do they fit,
what do they share.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from perl_jax.data.config import DataConfig
from perl_jax.data.loading import data_options
from perl_jax.data.store import KINDS, NoRows, RowSource, named_group
from perl_jax.data.tasks import Task, get_task
from perl_jax.runtime import hosts

# Characters of a shared prompt that are shown.
_SHOWN = 80

# (rows, task, split): raises UserError where a job cannot use the rows.
Check = Callable[[Sequence[Mapping[str, Any]], str, str], Any]


def check_splits(
    config: DataConfig, kind: str, needed: Sequence[str], check: Check | None = None
) -> tuple[str, ...]:
    """Reads every split of a kind of rows and says which prompts, and which groups, two of them
    share; returns the splits that have rows.

    needed: the splits that the job reads, now or after training; check: what must hold of each of
    them. UserError for a needed split that is missing, or that `check` refuses. Prompts are the
    same when their texts are, white space at both ends aside.
    """
    task = get_task(config.task)
    sources = hosts.in_turn(lambda: _sources(task, kind, needed, config))
    field, found, groups = KINDS[kind][0], {}, {}
    for split, source in sources.items():
        rows = list(source)
        if check is not None and split in needed:
            check(rows, task.name, split)
        # As a dictionary: in the order of the rows.
        found[split] = dict.fromkeys(row[field].strip() for row in rows)
        groups[split] = dict.fromkeys(filter(None, map(named_group, rows)))
    if hosts.is_writer():
        for line in shared(task.name, f"{field}s", found) + shared(task.name, "groups", groups):
            print(line, flush=True)
    return tuple(sources)


def _sources(
    task: Task, kind: str, needed: Sequence[str], config: DataConfig
) -> dict[str, RowSource]:
    """The rows of each split: of the needed ones in any case, of the others where there are any."""
    sources, others = {}, (split for split in task.splits.get(kind, ()) if split not in needed)
    for split in (*needed, *others):
        try:
            sources[split] = task.open(kind, split, data_options(config))
        except NoRows:
            if split in needed:
                raise
    return sources


def shared(task: str, what: str, prompts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A sentence for each two splits with prompts in common: how many different ones, and the
    first. what: `prompts`, `texts` or `groups`.
    """
    lines = []
    for (one, mine), (other, theirs) in itertools.combinations(prompts.items(), 2):
        both = [prompt for prompt in theirs if prompt in mine]
        if both:
            first = both[0] if len(both[0]) <= _SHOWN else f"{both[0][:_SHOWN]}…"
            lines.append(
                f"{task}: the splits {one} and {other} share {len(both)} of the latter's "
                f"{len(theirs)} {what}, such as {first!r}; neither is held out from the other "
                "there."
            )
    return lines
