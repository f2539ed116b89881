"""Rows of text to ragged token arrays, with one stated truncation rule."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np

from perl_jax.data.store import DEFAULTS, KINDS, NUMBERS
from perl_jax.errors import UserError, one_of


class Encoder(Protocol):
    """What the pipeline asks of a tokenizer."""

    pad_id: int
    bos_id: int | None
    # What the chat template writes after a response's last token.
    tail_ids: Sequence[int]

    def prompt_ids(self, text: str) -> list[int]:
        """Ids of a prompt, after which a response is written (with bos where there is one)."""

    def is_rendered(self, text: str) -> bool:
        """Whether a prompt already is what the chat template makes."""

    def shortened_prompt(self, text: str, limit: int) -> list[int] | None:
        """Shortens a prompt that has more than `limit` ids: cuts its text and keeps the template.
        Returns None when the caller must cut the ids instead.
        """

    def response_ids(self, text: str) -> list[int]:
        """Ids of a complete response, the token that ends the turn at the end."""

    def text_ids(self, text: str) -> list[int]:
        """Ids of free text: bos, text, eos."""


@dataclasses.dataclass(frozen=True)
class Ragged:
    """Sequences of different lengths in one int32 array: row i is values[offsets[i]:offsets[i +
    1]].
    """

    values: np.ndarray
    offsets: np.ndarray

    @classmethod
    def of(cls, sequences: Iterable[Sequence[int]]) -> Ragged:
        """Stores sequences of ids one after the other."""
        rows = [np.asarray(ids, np.int32) for ids in sequences]
        offsets = np.cumsum([0, *map(len, rows)], dtype=np.int64)
        return cls(np.concatenate([np.zeros(0, np.int32), *rows]), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sequence."""
        return np.diff(self.offsets)


@dataclasses.dataclass(frozen=True)
class TokenRows:
    """A split's rows in tokens.

    prompts: what no loss is taken over (of corpus rows: the first token, which is bos).
    responses: one Ragged, two for comparisons (chosen, rejected), none for prompts.
    numbers: float32 by field, for comparisons (`NUMBERS`), labels and ratings.
    truncated: how many prompts and responses were cut, for the log. cut: rows with anything cut.
    templated: prompts that were cut with the chat template left whole. rendered: prompts that came
    rendered. tails: of each response, how many of its last tokens are the template's tail, which no
    loss is taken
        over (`Tokenizer.tail_ids`); a response that was cut has none. Empty: no response has one.
    equal: of each comparison, whether its two responses are the same tokens, cut as they are; None:
    these
        are no comparisons. equal_uncut: comparisons that would be equal without a cut too.
    """

    kind: str
    prompts: Ragged
    responses: tuple[Ragged, ...]
    numbers: Mapping[str, np.ndarray]
    truncated: Mapping[str, int]
    rendered: int = 0
    tails: tuple[np.ndarray, ...] = ()
    cut: int = 0
    templated: int = 0
    equal: np.ndarray | None = None
    equal_uncut: int = 0

    @property
    def facts(self) -> dict[str, int]:
        """Numbers of rows for the log and the report: all, cut ones, rendered prompts, pairs in no
        order.
        """
        found = {"rows": len(self.prompts), "cut": self.cut} | {
            f"cut_{what}": number for what, number in self.truncated.items()
        }
        if "prompts" in self.truncated:
            found |= {"cut_prompts_template_whole": self.templated, "rendered": self.rendered}
        if self.equal is not None:
            found |= {
                "equal_pairs": self.equal_uncut,
                "equal_after_cutting": int(self.equal.sum()) - self.equal_uncut,
            }
        return found

    @property
    def longest_tail(self) -> int:
        """Tokens of the longest tail."""
        return max((int(tail.max(initial=0)) for tail in self.tails), default=0)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens a row needs: prompt plus the longest of its responses."""
        responses = [response.lengths for response in self.responses]
        return self.prompts.lengths + (np.maximum.reduce(responses) if responses else 0)


RESPONSES = {
    "demonstrations": ("response",),
    "comparisons": ("chosen", "rejected"),
    "labels": ("response",),
    "ratings": ("response",),
    "prompts": (),
    "corpus": (),
}


def clip_prompt(ids: Sequence[int], limit: int, bos_id: int | None) -> list[int]:
    """The last `limit` tokens of a prompt; a leading bos stays, before the last `limit - 1`.

    The end is kept because it is what the response answers; a model trained with bos needs it
    first.
    """
    ids = list(ids)
    if len(ids) <= limit:
        return ids
    if ids[0] == bos_id:
        return [ids[0], *ids[len(ids) - limit + 1 :]]
    return ids[-limit:]


class RowError(UserError):
    """What is wrong with one row. index: its number in the source, from 0; reason: the sentence,
    without it.
    """

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(f"Row {index + 1}: {reason}")
        self.index, self.reason = index, reason


def encoded(
    rows: Sequence[Mapping[str, str | float]], encode: Callable[[str], Any], field: str
) -> list[Any]:
    """encode(text) of a field of every row; RowError for one that cannot be encoded."""
    found = []
    for index, row in enumerate(rows):
        try:
            found.append(encode(row[field]))
        except UserError as error:
            raise RowError(index, str(error)) from error
    return found


def clip_response(ids: Sequence[int], limit: int) -> list[int]:
    """The first `limit` tokens of a response: a longer one loses its eos, none is put in its
    place.
    """
    return list(ids[:limit])


def tokenise(
    rows: Iterable[Mapping[str, str | float]],
    kind: str,
    encoder: Encoder,
    prompt_limit: int,
    response_limit: int,
) -> TokenRows:
    """Tokenises all rows of a kind once.

    Prompts keep the end of their text (`Encoder.shortened_prompt`, `clip_prompt`), responses their
    first tokens (`clip_response`), corpus texts their first prompt_limit + response_limit. A
    response that is whole is followed by the template's tail, beyond response_limit. Every corpus
    token but the first is a response token. RowError for a row that has no tokens to begin with, or
    cannot be encoded.
    """
    one_of("kind", kind, RESPONSES)
    rows = list(rows)
    if kind == "corpus":
        whole = encoded(rows, encoder.text_ids, "text")
        texts = [clip_response(ids, prompt_limit + response_limit) for ids in whole]
        cut = count_cut(whole, texts)
        heads, tails = Ragged.of(ids[:1] for ids in texts), Ragged.of(ids[1:] for ids in texts)
        return TokenRows(kind, heads, (tails,), {}, {"texts": cut}, cut=cut)
    rendered = sum(encoder.is_rendered(row["prompt"]) for row in rows)
    prompts = encoded(rows, functools.partial(_prompt, encoder, prompt_limit), "prompt")
    empty = next((index for index, (ids, _) in enumerate(prompts) if not ids), None)
    if empty is not None:
        raise RowError(
            empty,
            "the prompt has no tokens, and the tokenizer no bos to begin with; a response needs "
            "something before it.",
        )
    cut_B = np.asarray([how is not None for _, how in prompts], bool)
    truncated, templated = {"prompts": int(cut_B.sum())}, sum(how == "text" for _, how in prompts)
    responses, tails, uncut = [], [], []
    tail = list(encoder.tail_ids)
    for field in RESPONSES[kind]:
        whole = encoded(rows, encoder.response_ids, field)
        clipped = [clip_response(ids, response_limit) for ids in whole]
        ended_B = np.asarray([len(a) == len(b) for a, b in zip(whole, clipped, strict=True)], bool)
        truncated[field], cut_B = int((~ended_B).sum()), cut_B | ~ended_B
        responses.append(
            Ragged.of(ids + tail if end else ids for ids, end in zip(clipped, ended_B, strict=True))
        )
        tails.append(len(tail) * ended_B.astype(np.int64))
        uncut.append(whole)
    numbers = {
        name: np.asarray([row.get(name, DEFAULTS.get(name)) for row in rows], np.float32)
        for name in KINDS[kind]
        if name in NUMBERS
    }
    pairs = (
        {}
        if kind != "comparisons"
        else {"equal": equal_rows(*responses), "equal_uncut": sum(map(operator.eq, *uncut))}
    )
    heads = Ragged.of(ids for ids, _ in prompts)
    return TokenRows(
        kind,
        heads,
        tuple(responses),
        numbers,
        truncated,
        rendered,
        tuple(tails) if tail else (),
        int(cut_B.sum()),
        templated,
        **pairs,
    )


def _prompt(
    encoder: Encoder, limit: int, text: str
) -> tuple[list[int], Literal["text", "ids"] | None]:
    """Returns a prompt's ids, at most `limit`, and what was shortened for that.

    "text": the text was shortened and the chat template is whole. "ids": ids were cut from the
    front. None: nothing was cut.
    """
    ids = encoder.prompt_ids(text)
    if len(ids) <= limit:
        return ids, None
    found = encoder.shortened_prompt(text, limit)
    return (clip_prompt(ids, limit, encoder.bos_id), "ids") if found is None else (found, "text")


def equal_rows(a: Ragged, b: Ragged) -> np.ndarray:
    """Returns for each row whether `a` and `b` hold the same ids there, [rows] bool."""
    return np.asarray([np.array_equal(a[index], b[index]) for index in range(len(a))], bool)


def count_cut(whole: Sequence[Sequence[int]], clipped: Sequence[Sequence[int]]) -> int:
    """Returns how many sequences became shorter."""
    return sum(len(a) > len(b) for a, b in zip(whole, clipped, strict=True))


def fill(
    sequences: Iterable[Sequence[np.ndarray]], columns: int, pad_id: int, *, left: bool = False
):
    """(tokens, valid), each [rows, columns], of sequences given as pieces to join; padded on one
    side.
    """
    joined = [list(itertools.chain.from_iterable(pieces)) for pieces in sequences]
    tokens = np.full((len(joined), columns), pad_id, np.int32)
    valid = np.zeros((len(joined), columns), bool)
    for row, ids in enumerate(joined):
        where = slice(columns - len(ids), columns) if left else slice(0, len(ids))
        tokens[row, where] = ids
        valid[row, where] = True
    return tokens, valid
