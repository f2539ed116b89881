"""Makes a batch of arrays from tokenised rows: padding, masks, numbers; `COLLATE` has the kinds."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from perl_jax.data.bucketing import FILLER
from perl_jax.data.mismatched import MISMATCHED
from perl_jax.data.tokenise import TokenRows, fill
from perl_jax.types import Labelled, Layout, Pairs, Prompts, Tokens

Batch = Tokens | Pairs | Labelled | Prompts


def collate(rows: TokenRows, indices: np.ndarray, columns: int, pad_id: int) -> Batch:
    """Returns the batch of some rows, of the class that `COLLATE` makes of their kind.

    Args:
        rows: The tokenised rows of a split.
        indices: Indices into the split, int [B]. `FILLER` makes a row without valid tokens, of
            weight 0.
        columns: The padded length in tokens.
        pad_id: The token id of padding.
    """
    return COLLATE[rows.kind](rows, indices, columns, pad_id)


def with_layout(batch: Batch, layout: Layout | None) -> Batch:
    """Returns a batch with the layout set on each of its `Tokens`; prompts are returned unchanged.

    Args:
        batch: The batch.
        layout: How the rows of the batch are packed; None: they stay padded.
    """
    packed = functools.partial(dataclasses.replace, layout=layout)
    match batch:
        case Tokens():
            return packed(batch)
        case Pairs():
            return dataclasses.replace(
                batch, chosen=packed(batch.chosen), rejected=packed(batch.rejected)
            )
        case Labelled():
            other = None if batch.mismatched is None else packed(batch.mismatched)
            return dataclasses.replace(batch, tokens=packed(batch.tokens), mismatched=other)
        case Prompts():
            return batch


def pieces_of(rows: TokenRows, index: int, response: int | None) -> list[np.ndarray]:
    """Returns the token ids of a row as a list of arrays: the prompt, then one response. Filler
    gives [].

    Args:
        rows: The tokenised rows.
        index: The row's index in the split, or `FILLER`.
        response: The number of the response (0: the only or the chosen one, 1: the rejected one);
            None: the prompt alone.
    """
    if index == FILLER:
        return []
    return [rows.prompts[index], *([] if response is None else [rows.responses[response][index]])]


def right_padded(
    rows: TokenRows, indices: np.ndarray, columns: int, pad_id: int, response: int = 0
) -> Tokens:
    """Returns sequences [B, columns], each of prompt, response, the chat template's tail and
    padding.

    The response mask covers the response's tokens, including those that end the turn, but not the
    tail.

    Args:
        rows: The tokenised rows.
        indices: Indices into the split, int [B]; `FILLER` makes a row of padding.
        columns: The padded length in tokens.
        pad_id: The token id of padding.
        response: The number of the response (0: the only or the chosen one, 1: the rejected one).
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
    """Returns prompts [B, columns] with the padding on the left, so that all of them end in the
    last column.

    Args:
        rows: The tokenised rows.
        indices: Indices into the split, int [B], which the batch keeps; `FILLER` makes a row of
            padding.
        columns: The padded length in tokens.
        pad_id: The token id of padding.
    """
    tokens_BP, valid_BP = fill(
        [pieces_of(rows, index, None) for index in indices], columns, pad_id, left=True
    )
    return Prompts(tokens_BP, valid_BP, indices.astype(np.int32))


def pairs(rows: TokenRows, indices: np.ndarray, columns: int, pad_id: int) -> Pairs:
    """Returns comparisons [B] with their weights, probabilities and margins, which are 0 for
    filler.

    Args:
        rows: The tokenised rows.
        indices: Indices into the split, int [B]; `FILLER` makes a pair of rows of padding.
        columns: The padded length of each response with its prompt, in tokens.
        pad_id: The token id of padding.
    """
    chosen = right_padded(rows, indices, columns, pad_id, response=0)
    rejected = right_padded(rows, indices, columns, pad_id, response=1)
    numbers = {
        name: np.where(indices == FILLER, 0, values[indices])
        for name, values in rows.numbers.items()
    }
    return Pairs(chosen, rejected, numbers["weight"], numbers["probability"], numbers["margin"])


def labelled(rows: TokenRows, indices: np.ndarray, columns: int, pad_id: int) -> Labelled:
    """Returns responses [B] with their labels or ratings, and weight 1; value and weight of filler
    are 0.

    Args:
        rows: The tokenised rows.
        indices: Indices into the split, int [B]; `FILLER` makes a row of padding.
        columns: The padded length in tokens.
        pad_id: The token id of padding.
    """
    (values,) = rows.numbers.values()
    real_B = (indices != FILLER).astype(np.float32)
    return Labelled(right_padded(rows, indices, columns, pad_id), values[indices] * real_B, real_B)


def mismatched(rows: TokenRows, indices: np.ndarray, columns: int, pad_id: int) -> Labelled:
    """Returns labelled responses [B] (`labelled`) and mismatched ones: each prompt with another
    row's response.

    Args:
        rows: The tokenised rows, of the kind mismatched.
        indices: Indices into the split, int [B]; `FILLER` makes a row of padding.
        columns: The padded length of each response with its prompt, in tokens.
        pad_id: The token id of padding.
    """
    others = right_padded(rows, indices, columns, pad_id, response=1)
    return dataclasses.replace(labelled(rows, indices, columns, pad_id), mismatched=others)


COLLATE = {
    "demonstrations": right_padded,
    "corpus": right_padded,
    "comparisons": pairs,
    "labels": labelled,
    "ratings": labelled,
    MISMATCHED: mismatched,
    "prompts": left_padded,
}
