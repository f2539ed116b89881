"""A small base and an adapter for each task, trained on ReDial's train side where no model is
given.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from augment import AugmentConfig, Linker, template_conversations
from documents import passages_of
from redial import Case, Dialogue, Movie, cases_of
from systems import mention_counts
from texts import heuristic_query, query_prompt, writer_example

from perl_jax.data.config import DataConfig
from perl_jax.runtime import files
from perl_jax.training.base import BaseConfig, train_base
from perl_jax.training.commands import SFTCommand, run_sft
from perl_jax.training.optimizers import OptimizerConfig

VALIDATION = 20  # every so many rows, one is for validation
OPTIMIZER = OptimizerConfig(
    name="adamw", schedule="linear", warmup_steps=20, b2=0.98, learning_rate=3e-3
)


def write_split(
    folder: pathlib.Path, rows: Mapping[str, Sequence[Mapping[str, Any]]]
) -> pathlib.Path:
    """One JSON Lines file a split, as the task jsonl reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, found in rows.items():
        files.write_atomically(
            folder / f"{split}.jsonl",
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found),
        )
    return folder


def apart(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Rows for training, and every VALIDATION-th for validation."""
    return {
        "train": [row for i, row in enumerate(rows) if i % VALIDATION],
        "validation": [row for i, row in enumerate(rows) if not i % VALIDATION],
    }


def genres_of(movies: Mapping[str, Movie]) -> frozenset[str]:
    return frozenset(genre.lower() for movie in movies.values() for genre in movie.genres)


def corpus(dialogues: Sequence[Dialogue], movies: Mapping[str, Movie]) -> list[dict[str, str]]:
    """Texts of both tasks: conversations written for a movie, and conversations with their queries.

    Made-up conversations of every movie are among the latter, so that titles that ReDial hardly
    names occur.
    """
    linker, genres = Linker(movies), genres_of(movies)
    mentions = mention_counts(dialogues, {movie: i for i, movie in enumerate(movies)})
    cases = [case for dialogue in dialogues for case in cases_of(dialogue) if case.context]
    config = AugmentConfig(below=10**9, copies=1, seed=1)
    cases += [
        Case(passage.dialogue, passage.at, passage.turns[: passage.at], (passage.movie,))
        for passage in template_conversations(movies, mentions, config)
    ]
    texts = [query_prompt(case, linker) + heuristic_query(case, genres) for case in cases]
    examples = [
        writer_example(p, movies, linker)
        for p in passages_of(dialogues, "recommended")
        if p.at > 0 and p.movie in movies
    ]
    return [
        {"text": text} for text in [*texts, *(prompt + response for prompt, response in examples)]
    ]


def small_base(
    root: pathlib.Path,
    dialogues: Sequence[Dialogue],
    movies: Mapping[str, Movie],
    steps: int,
    seed: int = 0,
) -> str:
    """The folder of a base trained on `corpus`; one that is there already is left as it is."""
    rows = corpus(dialogues, movies)
    folder = write_split(root / "corpus", apart(rows))
    data = DataConfig(
        task="jsonl", data_dir=str(folder), max_prompt_length=128, max_response_length=64
    )
    model = root / "base" / "model"
    job = BaseConfig(
        run=str(root / "base"),
        model=str(model),
        data=data,
        steps=steps,
        batch_size=16,
        evaluate_every=200,
        checkpoint_every=100,
        width=128,
        ffn_width=384,
        layers=3,
        heads=4,
        kv_heads=2,
        vocab_size=2048,
        optimizer=OPTIMIZER,
        seed=seed,
    )
    return str(train_base(job))


def adapter_of(
    root: pathlib.Path,
    name: str,
    model: str,
    rows: Sequence[Mapping[str, str]],
    steps: int,
    lengths: tuple[int, int],
    seed: int = 0,
) -> str:
    """The folder of an adapter fitted to demonstrations (`prompt`, `response`)."""
    parts = apart(rows)
    folder = write_split(root / f"{name}_demonstrations", parts)
    data = DataConfig(
        task="jsonl",
        data_dir=str(folder),
        max_prompt_length=lengths[0],
        max_response_length=lengths[1],
    )
    job = SFTCommand(
        run=str(root / name),
        model=model,
        data=data,
        steps=steps,
        batch_size=min(32, len(parts["train"])),
        evaluate_every=max(1, steps // 2),
        optimizer=OPTIMIZER,
        seed=seed,
    )
    return str(run_sft(job))
