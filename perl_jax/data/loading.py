"""A job's batches: its rows opened, tokenised and packed for a model."""

from __future__ import annotations

from typing import Any

from perl_jax import errors
from perl_jax.data.config import DataConfig
from perl_jax.data.counts import said_of
from perl_jax.data.pipeline import Batches, BatchSpec, make_batches
from perl_jax.data.store import DataOptions
from perl_jax.data.tasks import get_task
from perl_jax.data.tokenise import RowError
from perl_jax.errors import require
from perl_jax.hub.model import Model
from perl_jax.runtime import hosts, sharding


def data_options(config: DataConfig) -> DataOptions:
    """The data layer's options of a job."""
    return DataOptions(
        data_dir=config.data_dir,
        seed=config.data_seed,
        train_size=config.train_size,
        evaluation_size=config.evaluation_size,
    )


def check_context(model: Model, config: DataConfig) -> None:
    """Refuses lengths that the model has no positions for."""
    room = model.lm.config.max_positions
    tail = len(model.tokenizer.tail_ids)
    total = config.max_prompt_length + config.max_response_length + tail
    end = f" (with {tail} for the end of the chat template's turn)" if tail else ""
    require(
        total <= room,
        f"max_prompt_length + max_response_length is {total}{end}; {model.name} has {room} "
        "positions.",
    )


def load_batches(
    model: Model,
    config: DataConfig,
    kind: str,
    split: str,
    batch_size: int,
    seed: int | None,
    microbatches: int = 1,
    *,
    most: int | None = None,
    lengths: tuple[int, ...] | None = None,
) -> tuple[Batches, Any]:
    """Batches of a task's rows and the rows; seed None: in order, once, the last batch filled up.

    most: the first so many rows only. lengths: padded lengths to take where they hold the rows, so
    that programs compiled for them are used again.
    """
    task = get_task(config.task)
    rows = hosts.in_turn(lambda: task.open(kind, split, data_options(config)))
    if most is not None:
        rows = [rows[index] for index in range(min(most, len(rows)))]
    share = sharding.row_share(model.mesh)
    spec = BatchSpec(
        batch_size=batch_size,
        max_prompt_length=config.max_prompt_length,
        max_response_length=config.max_response_length,
        bucket_count=config.bucket_count,
        buckets=lengths,
        shuffle_seed=seed,
        epochs=None if seed is not None else 1,
        process_index=share.index,
        process_count=share.count,
        packed=model.packs(config.packing),
        parts=model.row_parts,
        microbatches=microbatches,
    )
    try:
        return make_batches(rows, kind, model.tokenizer, spec), rows
    except RowError as error:
        raise errors.UserError(
            f"{task.place(kind, split, data_options(config), error.index)}: {error.reason}"
        ) from error


def noted(config: DataConfig, split: str, batches: Batches) -> dict[str, float]:
    """Says what a split's rows lost to fit (`tokenise.said_of`); returns its numbers as metrics,
    written with a run's first step.

    UserError where no two responses of any comparison differ.
    """
    rows = batches.rows
    apart = (
        f"Every comparison of the {split} split of {config.task} has two equal responses, cut "
        f"to max_response_length {config.max_response_length} as they are; some must differ."
    )
    errors.require(rows.equal is None or not rows.equal.all(), apart)
    if hosts.is_writer():
        for sentence in said_of(rows.facts, config.max_prompt_length, config.max_response_length):
            print(f"{config.task}, {split}: {sentence}", flush=True)
    return {f"data/{split}/{name}": number for name, number in rows.facts.items()}
