"""Which rows a job reads, and how long they may be."""

from __future__ import annotations

import dataclasses
from typing import Literal

from perl_jax import errors
from perl_jax.hub.chat import DATE
from perl_jax.runtime.programs import LENGTHS


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The task and the lengths of its rows, in tokens.

    Attributes:
        task: orders (embedded), taskmaster_coffee, taskmaster_ticketing, taskmaster (the corpora of
        both), or jsonl. data_dir: The data set's upstream folder; for jsonl the file or folder.
        data_seed: Seed of the embedded task's rows. train_size: At most so many rows of the
        training split; None: all. evaluation_size: At most so many rows of each other split; None:
        all. max_prompt_length: In tokens, the chat template's among them; the text of longer
        prompts loses its beginning,
            and a prompt that came rendered its first turns.
        bucket_count: Rows are padded to at most so many lengths. A batch holds rows of similar
            length;
            1 mixes them all.
        max_response_length: In tokens; longer responses lose their end, eos included. In sampling,
            the room for a response.
        template: How prompts become a chat turn: auto (the tokenizer's chat template; prompts that
            are
            rendered already, which end with its cue and begin as it does or hold its special
            tokens, stay as they are), none, or a file with a Jinja template.
        template_date: What a template gets that asks for today's date, so that a resumed run has
        the same tokens. packing: Compute each real token once: no padding, and what rows have in
        common (a pair's prompt,
            a prompt's samples) a single time. auto: on a CPU or GPU.
    """

    task: str = "orders"
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
        errors.one_of("packing", self.packing, ("auto", "on", "off"))
        for field in ("bucket_count", "max_prompt_length", "max_response_length"):
            errors.whole(field, getattr(self, field))
        errors.require(
            self.bucket_count <= LENGTHS,
            f"bucket_count is {self.bucket_count}; it must be at most {LENGTHS}: each length is a "
            "program to compile.",
        )
        if ":" not in self.task:
            errors.read_by(
                "data.data_seed", self.data_seed, 0, f"the task {self.task}", ("the task orders",)
            )
        embedded = self.task == "orders" and self.data_dir is not None
        errors.require(
            not embedded,
            f"data.data_dir is {self.data_dir!r}, which the task orders (embedded) does not read; "
            "leave it out, or give data.task.",
        )
