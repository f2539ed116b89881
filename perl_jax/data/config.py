"""Which rows a job reads, and how long they may be."""

from __future__ import annotations

import dataclasses
from typing import Literal

from perl_jax import errors
from perl_jax.hub.chat import DATE
from perl_jax.runtime.programs import LENGTHS


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which rows a job reads, and how they become batches.

    Attributes:
        task: jsonl (your own JSON Lines), or PATH.py:NAME or MODULE:NAME for a `perl_jax.Task`.
        data_dir: For jsonl the file or the folder of the rows, on a disk or in a bucket; for a task
            that reads a data set the folder of its files.
        data_seed: Seed of the rows of a task that generates them.
        train_size: Read at most so many rows of the training split; None: all.
        evaluation_size: Read at most so many rows of each other split; None: all.
        bucket_count: Pad rows to at most so many different lengths. A batch holds rows of similar
            length; 1 mixes all rows.
        max_prompt_length: In tokens, with those of the chat template. A longer prompt loses the
            beginning of its text; a prompt that came rendered loses its first turns.
        max_response_length: In tokens. A longer response loses its end, eos too. In sampling, the
            largest number of new tokens.
        template: How prompts become a chat turn: auto (the tokenizer's chat template; a prompt that
            is rendered already stays as it is), none, or a file with a Jinja template.
        template_date: The date that is given to a template which asks for the current date, so that
            a resumed run has the same tokens.
        packing: Put the tokens of several rows into one row instead of padding each; a prompt that
            rows share (a pair, a prompt's samples) is computed once. auto: on CPUs and GPUs.
    """

    task: str = "jsonl"
    data_dir: str | None = None
    data_seed: int = 0
    train_size: int | None = None
    evaluation_size: int | None = None
    bucket_count: int = 4
    max_prompt_length: int = 512
    max_response_length: int = 128
    template: str = "auto"
    template_date: str = DATE
    packing: Literal["auto", "on", "off"] = "auto"

    def __post_init__(self) -> None:
        errors.in_range(self)
        errors.one_of("packing", self.packing, ("auto", "on", "off"))
        for field in ("bucket_count", "max_prompt_length", "max_response_length"):
            errors.whole(field, getattr(self, field))
        errors.require(
            self.bucket_count <= LENGTHS,
            f"bucket_count is {self.bucket_count}; it must be at most {LENGTHS}: each length is a "
            "program to compile.",
        )
        errors.positive("data_seed", self.data_seed, zero=True)
        for field in ("train_size", "evaluation_size"):
            if getattr(self, field) is not None:
                errors.positive(f"data.{field}", getattr(self, field))

    def size(self, split: str) -> int | None:
        """Returns the largest number of rows to read of a split; None: all."""
        return self.train_size if split == "train" else self.evaluation_size

    def longest(self, kind: str) -> int:
        """Returns the largest number of tokens of a row, without the chat template's tail.

        Args:
            kind: The kind of the rows (`data.store.KINDS`); prompts have no response.
        """
        return self.max_prompt_length + (0 if kind == "prompts" else self.max_response_length)
