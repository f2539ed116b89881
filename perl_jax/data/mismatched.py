"""Gives each labelled row the response of another row, from which KTO estimates a KL."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from perl_jax.data.tokenise import Ragged, TokenRows
from perl_jax.errors import require

# The kind of `TokenRows` with a second response. No task has rows of it.
MISMATCHED = "mismatched"


def partners(prompts: Sequence[str]) -> np.ndarray:
    """Returns for each row the index of another row with a different prompt, int [rows].

    It is the first such row from half the number of rows further on, counted in a circle. If all
    prompts are equal it is the row half the number of rows further on.

    Args:
        prompts: The prompts of all rows; white space at both ends does not count.

    Raises:
        UserError: There are fewer than two rows.
    """
    texts, rows = [prompt.strip() for prompt in prompts], len(prompts)
    require(
        rows > 1,
        f"A split has {rows} labelled row; KTO compares rows with each other and needs 2 or more.",
    )
    # The first row after each one whose prompt is another. Two rounds, for the circle.
    change = np.arange(rows)
    for index in range(2 * rows - 1, -1, -1):
        row, after = index % rows, (index + 1) % rows
        change[row] = after if texts[after] != texts[row] else change[after]
    half = (np.arange(rows) + rows // 2) % rows
    same = np.asarray([texts[row] == texts[other] for row, other in enumerate(half)])
    found = np.where(same, change[half], half)
    alone = np.asarray([texts[row] == texts[other] for row, other in enumerate(found)])
    return np.where(alone, half, found)


def with_others(rows: TokenRows, prompts: Sequence[str]) -> TokenRows:
    """Returns labelled rows with a second response: that of the row's partner (`partners`).

    Args:
        rows: The tokenised rows, with one response each.
        prompts: The prompts' texts.

    Raises:
        UserError: There are fewer than two rows.
    """
    partner, (own,) = partners(prompts), rows.responses
    other = Ragged.of(own[index] for index in partner)
    tails = tuple(side for tail in rows.tails for side in (tail, tail[partner]))
    return dataclasses.replace(rows, kind=MISMATCHED, responses=(own, other), tails=tails)
