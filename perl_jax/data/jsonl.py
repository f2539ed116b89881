"""Reads and checks the user's own rows: UTF-8 JSON Lines, one JSON object per line."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from perl_jax.data import row_checks
from perl_jax.data.config import DataConfig
from perl_jax.data.row_checks import COMPARED, checked_rows
from perl_jax.data.store import (
    KINDS,
    OPEN,
    SPLITS,
    TENTHS,
    RowsBuilder,
    named_group,
    part_of,
)
from perl_jax.errors import UserError, require
from perl_jax.runtime import files


def read_jsonl(
    path: files.PathLike, fields: Sequence[str], others: bool = False
) -> list[dict[str, Any]]:
    """Returns the rows of a JSON Lines file. Blank lines are skipped.

    `label` and `probability` are numbers in [0, 1], `weight` is 0 or more, `margin` and `rating`
    are any finite numbers, `group` is a string or a number, and `finished` is true or false. Every
    other one of `fields` is a string that is not blank. The fields of `DEFAULTS` may be missing and
    then have their defaults.

    A line of comparisons may have `ranked`, two or more responses from best to worst, instead of
    `chosen` and `rejected`. It makes one row for every pair of responses; the weights of these rows
    add up to the weight of the line (Ouyang et al. 2022, arXiv 2203.02155, equation 1).

    Args:
        path: The file.
        fields: The names of the fields that each row gets.
        others: Whether rows keep all other fields too. They are not checked, except that `answer`
            and `group` must be a number or a string that is not blank.

    Raises:
        UserError: The file cannot be read or has no rows, or a line is wrong; the message names the
            file, the line (from 1) and the field.
    """
    return [row for _, row in numbered_rows(path, fields, others)]


def numbered_rows(
    path: files.PathLike,
    fields: Sequence[str],
    others: bool = False,
    compared: Sequence[str] = COMPARED,
) -> list[tuple[int, dict[str, Any]]]:
    """Returns (number of the line from 1, row) for each row of a file; several rows of a ranking
    have the same number.

    Args:
        path: The file.
        fields: The names of the fields that each row gets.
        others: Whether rows keep all other fields too.
        compared: The other fields that must be a number or a text that is not blank.

    Raises:
        UserError: The file cannot be read or has no rows, or a line is wrong (`read_jsonl`).
    """
    path = files.path_of(path)
    lines = files.read_bytes(path).split(b"\n")
    numbered = enumerate(lines, start=1)
    rows = [
        (number, row)
        for number, line in numbered
        if line.strip()
        for row in parse_line(line, fields, f"{path}, line {number}", others, compared)
    ]
    require(bool(rows), f"{path} is empty; it must hold one JSON object a line.")
    return rows


def parse_line(
    line: bytes,
    fields: Sequence[str],
    where: str,
    others: bool = False,
    compared: Sequence[str] = COMPARED,
) -> list[dict[str, Any]]:
    """Returns the rows of a line: one, or the pairs of its ranked responses (`read_jsonl`).

    Args:
        line: The line's bytes, not blank.
        fields: The names of the fields that each row gets.
        where: The file and the line, the beginning of an error message.
        others: Whether rows keep all other fields too.
        compared: The other fields that must be a number or a text that is not blank.

    Raises:
        UserError: The line is not a JSON object in UTF-8, or a field is missing, repeated or wrong.
    """
    try:
        # utf-8-sig: the byte order mark that some editors put before the first line is not content.
        value = json.loads(
            line.decode("utf-8-sig"), object_pairs_hook=functools.partial(_distinct, where)
        )
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text (byte {error.start}).") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not valid JSON ({error.msg}, column {error.colno}).") from error
    except RecursionError as error:
        raise UserError(f"{where}: not valid JSON (nested too deeply).") from error
    except ValueError as error:  # an integer of thousands of digits
        raise UserError(f"{where}: not valid JSON ({error}).") from error
    return checked_rows(value, fields, where, others, compared)


def _distinct(where: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns the fields of a JSON object as a dictionary; raises UserError if a field occurs more
    than once.

    JSON readers disagree on which of the values counts.

    Args:
        where: The file and the line, the beginning of the message.
        pairs: (name, value) of each field, in order.
    """
    names = [name for name, _ in pairs]
    twice = sorted({name for name in names if names.count(name) > 1})
    require(not twice, f"{where}: the field {', '.join(twice)} is there more than once.")
    return dict(pairs)


def split_of(text: str) -> str:
    """Returns the split that a row of a single file belongs to: train, validation or test.

    It is decided by a hash of the text: 80 % of the hashes are train, 10 % validation, 10 % test.

    Args:
        text: The row's group, or its prompt or text if it has no group.
    """
    return part_of(text, TENTHS)


def find(config: DataConfig) -> files.Path:
    """Returns the file or folder of the user's rows, `config.data_dir`.

    Raises UserError if it is not given or does not exist.
    """
    if config.data_dir is None:
        raise UserError(
            "The task jsonl needs --data.data-dir: a .jsonl file, or a folder of them; --data.task "
            "PATH.py:NAME names another task."
        )
    path = files.path_of(config.data_dir)
    require(files.exists(path), f"There is no file or folder {path}.")
    return path


class JsonlBuilder(RowsBuilder):
    """Reads the user's own rows from a JSON Lines file, or from a folder of such files.

    A single file is split 80/10/10 by a hash of each row's group (of its prompt or text, if the row
    has no group), so that the rows of a group stay in one split. A folder has train.jsonl,
    validation.jsonl and test.jsonl; a split without a file has no rows.

    A row's field `split`, if it has one, says to which split it belongs. So the rows that `best-of`
    made of test prompts are never trained on.

    Other columns of prompts are passed to the rewards unchanged. Other columns of other kinds of
    rows are dropped.
    """

    name = "jsonl"
    sources = (row_checks,)

    @classmethod
    def kind_splits(cls) -> dict[str, tuple[str, ...]]:
        """Returns the splits of each kind of rows: any kind may have any split."""
        return dict.fromkeys(KINDS, SPLITS)

    @classmethod
    def content(cls, kind: str, config: DataConfig) -> object:
        """Returns [whether `data_dir` is a single file, {file name: hash}] of the files that exist.

        Raises UserError if there is none.
        """
        path = find(config)
        single = files.is_file(path)
        given = [path] if single else [path / f"{split}.jsonl" for split in SPLITS]
        found = {file.name: files.file_hash(file) for file in given if files.is_file(file)}
        require(
            bool(found), f"{path} holds none of {', '.join(f'{split}.jsonl' for split in SPLITS)}."
        )
        return [single, found]

    @classmethod
    def rows(cls, kind: str, split: str, config: DataConfig) -> Iterator[dict]:
        """Returns an iterator over the rows of a split, in the order of the file.

        Args:
            kind: The kind of the rows (`KINDS`).
            split: One of `SPLITS`.
            config: `data_dir` names the file or the folder.

        Raises:
            UserError: A file cannot be read, or a line is wrong (`read_jsonl`).
        """
        return (row for _, _, row in cls._numbered(kind, split, config))

    @classmethod
    def location(cls, kind: str, split: str, config: DataConfig, index: int) -> str:
        """Returns the file and the line that a row comes from, as text for messages.

        Args:
            kind: The kind of the row.
            split: Its split.
            config: `data_dir` names the file or the folder.
            index: The row's number in the split, from 0.
        """
        file, line, _ = next(itertools.islice(cls._numbered(kind, split, config), index, None))
        return f"{file}, line {line}"

    @classmethod
    def why_no_rows(
        cls, kind: str, split: str, config: DataConfig, sizes: Mapping[str, int]
    ) -> str:
        """Returns the sentence on a split without rows: the file, how its rows are split, and what
        gives the split rows.

        Args:
            kind: The kind of the rows.
            split: The split.
            config: `data_dir` names the file or the folder.
            sizes: The number of rows of each split that has some.
        """
        path = find(config)
        said = f"{path} has no {kind} rows in its {split} split"
        if not files.is_file(path):
            return f"{said}: there is no file {path / f'{split}.jsonl'}."
        size = sum(sizes.values())
        names = " and ".join(f"{name}.jsonl" for name in dict.fromkeys(("train", split)))
        return (
            f"{said}: it has {size} {'row' if size == 1 else 'rows'}, and the rows of a single "
            "file are split 80/10/10 (train, validation, test) by a hash of their group, or of "
            f"their {KINDS[kind][0]} without one; give more rows, a folder with {names}, or rows "
            f'with "split": "{split}".'
        )

    @classmethod
    def _numbered(
        cls, kind: str, split: str, config: DataConfig
    ) -> Iterator[tuple[files.Path, int, dict]]:
        """Yields (file, number of the line from 1, row) for each row of a split.

        Args:
            kind: The kind of the rows.
            split: The split.
            config: `data_dir` names the file or the folder.

        Raises:
            UserError: A file cannot be read, or a line is wrong or of another split.
        """
        path, fields, others = find(config), KINDS[kind], kind in OPEN
        single = files.is_file(path)
        file = path if single else path / f"{split}.jsonl"
        for line, row in (
            numbered_rows(file, (*fields, "split"), others) if files.is_file(file) else []
        ):
            named = row.pop("split")
            if others and named:
                row["split"] = named
            if single:
                hashed = split_of(named_group(row) or row[fields[0]]) == split
                if named == split or (not named and hashed):
                    yield file, line, row
                continue
            require(
                named in ("", split),
                f"{file}, line {line}: the row's split is {named}, and the file holds the {split} "
                "split; put the row into the file of its split, or leave the field split out.",
            )
            yield file, line, row
