"""Turns rows of text into ragged arrays of tokens, and cuts what is too long."""

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
    """What tokenising rows needs of a tokenizer; `hub.tokenizer.Tokenizer` has it."""

    @property
    def pad_id(self) -> int:
        """The token id of padding."""
        ...

    @property
    def bos_id(self) -> int | None:
        """The id that begins a prompt; None if the tokenizer has none."""
        ...

    @property
    def tail_ids(self) -> Sequence[int]:
        """The ids that the chat template writes after a response's last token."""
        ...

    def prompt_ids(self, text: str) -> list[int]:
        """Returns the ids of a prompt, rendered by the chat template if there is one, with bos
        first if the tokenizer has one.
        """
        ...

    def is_rendered(self, text: str) -> bool:
        """Returns whether a prompt is already rendered by the chat template."""
        ...

    def shortened_prompt(self, text: str, limit: int) -> list[int] | None:
        """Returns at most `limit` ids of a prompt that has more: text is cut, the chat template
        stays whole.

        Returns None if that is not possible; the caller must then cut the ids.

        Args:
            text: The prompt.
            limit: The largest number of ids.
        """
        ...

    @property
    def stop_part(self) -> Sequence[int]:
        """The ids at the end of a complete response, which end the turn."""
        ...

    def response_ids(self, text: str) -> list[int]:
        """Returns the ids of a complete response; the last ones are `stop_part`."""
        ...

    def text_ids(self, text: str) -> list[int]:
        """Returns the ids of free text: bos, text, eos."""
        ...


@dataclasses.dataclass(frozen=True)
class Ragged:
    """Sequences of different lengths in one array.

    Attributes:
        values: The sequences' ids one after another, int32.
        offsets: Sequence i is values[offsets[i] : offsets[i + 1]], int64 [sequences + 1].
    """

    values: np.ndarray
    offsets: np.ndarray

    @classmethod
    def of(cls, sequences: Iterable[Sequence[int]]) -> Ragged:
        """Returns sequences of ids as one ragged array."""
        rows = [np.asarray(ids, np.int32) for ids in sequences]
        offsets = np.cumsum([0, *map(len, rows)], dtype=np.int64)
        return cls(np.concatenate([np.zeros(0, np.int32), *rows]), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """The length of each sequence, int64 [sequences]."""
        return np.diff(self.offsets)


@dataclasses.dataclass(frozen=True)
class TokenRows:
    """The rows of a split as tokens.

    Attributes:
        kind: The kind of the rows (`store.KINDS`), or `mismatched.MISMATCHED`.
        prompts: The tokens that are in no loss; of corpus rows the first token, which is bos.
        responses: One `Ragged`; two for comparisons (chosen, rejected) and mismatched rows (own,
            another row's); none for prompts.
        numbers: The columns of `store.NUMBERS` that the kind has, float32 [rows] each.
        truncated: How many texts were cut, by column: `prompts`, each name in `RESPONSES`, or
            `texts` of a corpus.
        rendered: How many prompts the chat template had already rendered.
        tails: For each of `responses`, how many of each row's last tokens are the chat template's
            tail (`Encoder.tail_ids`), [rows]. The tail is in no loss; a response that was cut has
            none. Empty if the template writes no tail.
        cut: How many rows have a prompt or a response that was cut.
        templated: How many prompts were cut with the chat template left whole.
        equal: Whether the two responses of each comparison, after cutting, are the same tokens,
            bool [rows]; None for other kinds.
        equal_uncut: How many comparisons have two responses that are equal before cutting.
        unfinished: How many responses are not complete, so that no token ends them.
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
    unfinished: int = 0

    @property
    def different(self) -> np.ndarray:
        """Whether the two responses of each comparison differ after cutting, bool [rows].

        Raises ValueError for rows of another kind.
        """
        if self.equal is None:
            raise ValueError(f"{self.kind} have one response, and nothing to compare it with")
        return ~self.equal

    @property
    def facts(self) -> dict[str, int]:
        """Numbers of rows for the log and the report, by name.

        `rows`: all rows. `cut`: rows with a text that was cut. `cut_COLUMN`: texts of a column that
        were cut, for each column of `truncated`.

        Of all kinds but corpus also `cut_prompts_template_whole`: prompts that were cut with the
        chat template left whole; `rendered`: prompts that were already rendered.

        Of comparisons also `equal_pairs`: pairs whose responses are equal before cutting;
        `equal_after_cutting`: further pairs whose responses are equal after it.

        If there are any, `unfinished`: responses that are not complete.
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
        return found | ({"unfinished": self.unfinished} if self.unfinished else {})

    @property
    def longest_tail(self) -> int:
        """The number of tokens of the longest tail; 0 without tails."""
        return max((int(tail.max(initial=0)) for tail in self.tails), default=0)

    @property
    def lengths(self) -> np.ndarray:
        """The tokens that each row needs, int [rows]: its prompt and the longest of its
        responses.
        """
        responses = [response.lengths for response in self.responses]
        return self.prompts.lengths + (np.maximum.reduce(responses) if responses else 0)


# The columns of each kind that hold responses.
RESPONSES = {
    "demonstrations": ("response",),
    "comparisons": ("chosen", "rejected"),
    "labels": ("response",),
    "ratings": ("response",),
    "prompts": (),
    "corpus": (),
}


def clip_prompt(ids: Sequence[int], limit: int, bos_id: int | None) -> list[int]:
    """Returns at most `limit` ids of a prompt: its end, after bos if the prompt begins with bos.

    The end is kept because the response answers the end. A leading bos is kept because a model that
    was trained with bos needs it.

    Args:
        ids: The ids of the prompt.
        limit: The largest number of ids.
        bos_id: The id of bos; None if the tokenizer has none.
    """
    ids = list(ids)
    if len(ids) <= limit:
        return ids
    if ids[0] == bos_id:
        return [ids[0], *ids[len(ids) - limit + 1 :]]
    return ids[-limit:]


class RowError(UserError):
    """An error in one row; the message begins with `Row N: `, counted from 1.

    Attributes:
        index: The row's number in the split, from 0.
        reason: The message without that number.
    """

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(f"Row {index + 1}: {reason}")
        self.index, self.reason = index, reason


def encoded(
    rows: Sequence[Mapping[str, Any]], encode: Callable[[str], Any], field: str
) -> list[Any]:
    """Returns encode(text) of one column of every row, as a list.

    Args:
        rows: The rows.
        encode: Called with each text.
        field: The name of the column.

    Raises:
        RowError: `encode` raises UserError for a row.
    """
    found = []
    for index, row in enumerate(rows):
        try:
            found.append(encode(row[field]))
        except UserError as error:
            raise RowError(index, str(error)) from error
    return found


def clip_response(ids: Sequence[int], limit: int) -> list[int]:
    """Returns the first `limit` ids of a response. A response that is cut loses the tokens that end
    it.
    """
    return list(ids[:limit])


def tokenise(
    rows: Iterable[Mapping[str, Any]],
    kind: str,
    encoder: Encoder,
    prompt_limit: int,
    response_limit: int,
) -> TokenRows:
    """Returns all rows of a split as tokens, cut to the largest lengths.

    Prompts keep their end (`Encoder.shortened_prompt`, `clip_prompt`). Responses keep their
    beginning (`clip_response`). A response that is not cut is followed by the chat template's tail,
    which does not count towards `response_limit`. A response that is not `finished` has neither the
    tokens that end a turn nor the tail. Corpus texts keep their first prompt_limit +
    response_limit tokens; every token but the first counts as response.

    Args:
        rows: The rows, with the columns of their kind.
        kind: Their kind (`store.KINDS`).
        encoder: Turns texts into token ids.
        prompt_limit: The largest number of tokens of a prompt.
        response_limit: The largest number of tokens of a response, including those that end it.

    Raises:
        UserError: The kind is unknown.
        RowError: A row cannot be encoded, or its prompt has no tokens.
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
    finished_B = np.asarray([row.get("finished", DEFAULTS["finished"]) for row in rows], bool)
    for field in RESPONSES[kind]:
        whole = encoded(rows, encoder.response_ids, field)
        if not finished_B.all():
            end = len(encoder.stop_part)
            whole = [
                ids if finished else ids[: len(ids) - end]
                for ids, finished in zip(whole, finished_B, strict=True)
            ]
        clipped = [clip_response(ids, response_limit) for ids in whole]
        kept_B = np.asarray([len(a) == len(b) for a, b in zip(whole, clipped, strict=True)], bool)
        truncated[field], cut_B = int((~kept_B).sum()), cut_B | ~kept_B
        ended_B = kept_B & finished_B
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
        unfinished=int((~finished_B).sum()),
    )


def _prompt(
    encoder: Encoder, limit: int, text: str
) -> tuple[list[int], Literal["text", "ids"] | None]:
    """Returns (the ids of a prompt, what was cut).

    What was cut is `text` if text was removed and the chat template is whole, `ids` if ids were
    removed at the front, and None if the prompt fits.

    Args:
        encoder: Turns texts into token ids.
        limit: The largest number of ids.
        text: The prompt.
    """
    ids = encoder.prompt_ids(text)
    if len(ids) <= limit:
        return ids, None
    found = encoder.shortened_prompt(text, limit)
    return (clip_prompt(ids, limit, encoder.bos_id), "ids") if found is None else (found, "text")


def equal_rows(a: Ragged, b: Ragged) -> np.ndarray:
    """Returns whether row i of `a` and row i of `b` have the same ids, for each i: bool [rows]."""
    return np.asarray([np.array_equal(a[index], b[index]) for index in range(len(a))], bool)


def count_cut(whole: Sequence[Sequence[int]], clipped: Sequence[Sequence[int]]) -> int:
    """Returns how many sequences are shorter in `clipped` than in `whole`."""
    return sum(len(a) > len(b) for a, b in zip(whole, clipped, strict=True))


def fill(
    sequences: Iterable[Sequence[np.ndarray]], columns: int, pad_id: int, *, left: bool = False
):
    """Returns (token ids int32, whether each is valid bool), each [rows, columns].

    Args:
        sequences: The pieces of each sequence, which are joined; [] is a row of padding.
        columns: The padded length; no sequence may be longer.
        pad_id: The token id of padding.
        left: Whether the padding is on the left.
    """
    joined = [list(itertools.chain.from_iterable(pieces)) for pieces in sequences]
    tokens = np.full((len(joined), columns), pad_id, np.int32)
    valid = np.zeros((len(joined), columns), bool)
    for row, ids in enumerate(joined):
        where = slice(columns - len(ids), columns) if left else slice(0, len(ids))
        tokens[row, where] = ids
        valid[row, where] = True
    return tokens, valid
