"""Makes a batch of arrays from tokenised rows: padding, masks, numbers; `COLLATE` has the kinds."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from perl_jax.data.bucketing import FILLER
from perl_jax.data.tokenise import TokenRows, fill
from perl_jax.types import Labelled, Layout, Pairs, Prompts, Tokens

Batch = Tokens | Pairs | Labelled | Prompts


def collate(rows: TokenRows, indices: np.ndarray, columns: int, pad_id: int) -> Batch:
    """Returns the batch of the rows at `indices`, padded to `columns` tokens.

    Index -1 makes a filler row: no token is valid and the row's weight is 0.
    """
    return COLLATE[rows.kind](rows, indices, columns, pad_id)


def with_layout(batch: Batch, layout: Layout | None) -> Batch:
    """Returns a batch with the layout set on each of its `Tokens`; prompts are unchanged."""
    packed = functools.partial(dataclasses.replace, layout=layout)
    match batch:
        case Tokens():
            return packed(batch)
        case Pairs():
            return dataclasses.replace(
                batch, chosen=packed(batch.chosen), rejected=packed(batch.rejected)
            )
        case Labelled():
            return dataclasses.replace(batch, tokens=packed(batch.tokens))
        case Prompts():
            return batch


def pieces_of(rows: TokenRows, index: int, response: int | None) -> list[np.ndarray]:
    """Returns the token ids of a row: its prompt and, if named, one response. Filler has none."""
    if index == FILLER:
        return []
    return [rows.prompts[index], *([] if response is None else [rows.responses[response][index]])]


def right_padded(
    rows: TokenRows, indices: np.ndarray, columns: int, pad_id: int, response: int = 0
) -> Tokens:
    """Returns sequences [rows, columns]: prompt, response, the chat template's tail, padding.

    The response mask covers the response's tokens with the one that ends the turn, but not the
    tail. `response` is the number of the response that is read (0: chosen, 1: rejected).
    """
    tokens_BT, valid_BT = fill(
        [pieces_of(rows, index, response) for index in indices], columns, pad_id
    )
    prompt_B = np.where(indices == FILLER, 0, rows.prompts.lengths[indices])
    tail_B = rows.tails[response][indices] if rows.tails else np.zeros(len(indices), np.int64)
    column_T = np.arange(columns)
    ends_B = valid_BT.sum(axis=1) - tail_B
    return Tokens(
        tokens_BT,
        valid_BT,
        valid_BT & (column_T >= prompt_B[:, None]) & (column_T < ends_B[:, None]),
    )


def left_padded(rows: TokenRows, indices: np.ndarray, columns: int, pad_id: int) -> Prompts:
    """Returns prompts [rows, columns] with the padding on the left, so that all end together."""
    tokens_BP, valid_BP = fill(
        [pieces_of(rows, index, None) for index in indices], columns, pad_id, left=True
    )
    return Prompts(tokens_BP, valid_BP, indices.astype(np.int32))


def pairs(rows: TokenRows, indices: np.ndarray, columns: int, pad_id: int) -> Pairs:
    """Returns comparisons with their weights, probabilities and margins; all 0 for filler."""
    chosen = right_padded(rows, indices, columns, pad_id, response=0)
    rejected = right_padded(rows, indices, columns, pad_id, response=1)
    numbers = {
        name: np.where(indices == FILLER, 0, values[indices])
        for name, values in rows.numbers.items()
    }
    return Pairs(chosen, rejected, numbers["weight"], numbers["probability"], numbers["margin"])


def labelled(rows: TokenRows, indices: np.ndarray, columns: int, pad_id: int) -> Labelled:
    """Returns responses with their labels or ratings, and weight 1 (filler: weight 0)."""
    (values,) = rows.numbers.values()
    real_B = (indices != FILLER).astype(np.float32)
    return Labelled(right_padded(rows, indices, columns, pad_id), values[indices] * real_B, real_B)


COLLATE = {
    "demonstrations": right_padded,
    "corpus": right_padded,
    "comparisons": pairs,
    "labels": labelled,
    "ratings": labelled,
    "prompts": left_padded,
}
