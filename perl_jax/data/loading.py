"""A job's batches: the rows of a split, tokenised and packed for a model."""

from __future__ import annotations

import math
from collections.abc import Sequence

from perl_jax.data.bucketing import fitting_batch
from perl_jax.data.config import DataConfig
from perl_jax.data.counts import said_of
from perl_jax.data.dataset import Dataset
from perl_jax.data.pipeline import Batches, make_batches
from perl_jax.data.tokenise import RowError, TokenRows, tokenise
from perl_jax.errors import UserError, require
from perl_jax.hub.model import Model
from perl_jax.hub.tokenizer import Tokenizer
from perl_jax.runtime import hosts, progress, sharding


def check_context(model: Model, config: DataConfig) -> None:
    """Raises UserError if prompt, response and the template's tail can be longer than the model has
    positions.

    Args:
        model: The model and its tokenizer.
        config: The largest lengths of prompts and responses.
    """
    positions = model.lm.config.max_positions
    tail = len(model.tokenizer.tail_ids)
    total = config.max_prompt_length + config.max_response_length + tail
    end = f" (with {tail} for the end of the chat template's turn)" if tail else ""
    require(
        total <= positions,
        f"max_prompt_length + max_response_length is {total}{end}; {model.name} has {positions} "
        "positions.",
    )


def tokenised(dataset: Dataset, split: str, tokenizer: Tokenizer, config: DataConfig) -> TokenRows:
    """Returns the rows of a split as tokens; those of one tokenizer and one length are kept.

    Args:
        dataset: The rows.
        split: The split of the dataset.
        tokenizer: The model's tokenizer.
        config: The largest lengths of prompts and responses.

    Raises:
        UserError: The split has no rows, or a row cannot be encoded; the message says where it is.
    """
    lengths = (config.max_prompt_length, config.max_response_length)
    key = (split, *lengths)
    owner, tokens = dataset.tokens.get(key, (None, None))
    if owner is not tokenizer:
        rows = dataset.rows(split)
        try:
            with progress.activity(f"tokenising {len(rows)} {split} rows"):
                tokens = tokenise(rows, dataset.kind, tokenizer, *lengths)
        except RowError as error:
            raise UserError(f"{dataset.location(split, error.index)}: {error.reason}") from error
        dataset.tokens[key] = tokenizer, tokens
    return tokens


def check_rows(dataset: Dataset, splits: Sequence[str], config: DataConfig, model: Model) -> None:
    """Checks lengths, and tokenises splits; for `load_model`, before the weights are read.

    Args:
        dataset: The rows.
        splits: The splits that the job reads.
        config: The largest lengths of prompts and responses.
        model: The model without its weights.

    Raises:
        UserError: Rows can be longer than the model has positions, or a row cannot be encoded.
    """
    check_context(model, config)
    for split in splits:
        tokenised(dataset, split, model.tokenizer, config)


def load_batches(
    model: Model,
    dataset: Dataset,
    split: str,
    config: DataConfig,
    batch_size: int,
    seed: int | None,
    microbatches: int = 1,
    *,
    most: int | None = None,
    lengths: tuple[int, ...] | None = None,
    fitting: bool = False,
    others: bool = False,
) -> Batches:
    """Returns the batches of a split; each process builds only its own part of them.

    Args:
        model: Gives the tokenizer, the mesh, and whether `auto` packs rows.
        dataset: The rows.
        split: The split of the dataset to read.
        config: How rows are cut, padded and packed.
        batch_size: Rows of a whole batch, over all devices.
        seed: Seed of the order of rows, which are repeated without end. None: each row once in a
            fixed order, and the last batch is filled up with filler rows.
        microbatches: Microbatches of the update that reads the batches.
        most: Read only the first so many rows; None: all.
        lengths: Padded lengths, so that programs compiled for them are used again; the longest row
            must fit into the last one. None: selected from the rows.
        fitting: Whether batches are smaller if all rows fit into one (`bucketing.fitting_batch`).
        others: Whether each labelled row gets the response of another row as well.

    Raises:
        UserError: The split has no rows, a row cannot be encoded, or `Batches` refuses an argument.
    """
    rows = dataset.rows(split)
    if most is not None:
        rows = [rows[index] for index in range(min(most, len(rows)))]
    share = sharding.row_share(model.mesh)
    if fitting:
        multiple = math.lcm(model.row_parts * microbatches, share.count)
        batch_size = fitting_batch(batch_size, len(rows), multiple)
    try:
        return make_batches(
            rows,
            dataset.kind,
            model.tokenizer,
            config,
            batch_size,
            tokenised(dataset, split, model.tokenizer, config) if most is None else None,
            seed=seed,
            epochs=None if seed is not None else 1,
            lengths=lengths,
            others=others,
            share=share,
            packed=model.packs(config.packing),
            parts=model.row_parts,
            microbatches=microbatches,
        )
    except RowError as error:
        raise UserError(f"{dataset.location(split, error.index)}: {error.reason}") from error


def noted(dataset: Dataset, split: str, config: DataConfig, batches: Batches) -> dict[str, float]:
    """Prints how many texts of a split were cut; returns the numbers as metrics of a run's first
    step.

    The metrics are those of `TokenRows.facts`, with `data/SPLIT/` before each name. Only the first
    process prints.

    Args:
        dataset: The rows.
        split: The split.
        config: The largest lengths of prompts and responses.
        batches: The batches of the split.

    Raises:
        UserError: No comparison has two different responses.
    """
    rows = batches.rows
    require(
        rows.equal is None or not rows.equal.all(),
        f"Every comparison of the {split} split of {dataset.name} has two equal responses, cut to "
        f"max_response_length {config.max_response_length} as they are; some must differ.",
    )
    if hosts.is_writer():
        for sentence in said_of(rows.facts, config.max_prompt_length, config.max_response_length):
            print(f"{dataset.name}, {split}: {sentence}", flush=True)
    return {f"data/{split}/{name}": number for name, number in rows.facts.items()}
