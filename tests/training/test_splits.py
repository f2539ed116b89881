"""Splits are looked at before a model is even loaded: missing ones, unfit ones, prompts that two of
them share.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from perl_jax.data.config import DataConfig
from perl_jax.data.dataset import of_task, shared
from perl_jax.errors import UserError
from perl_jax.training import base as base_lib
from perl_jax.training import commands
from perl_jax.training.commands import DPOCommand, RewardCommand, RLCommand, SFTCommand
from tests.paths import ORDERS


@pytest.fixture(autouse=True)
def own_cache(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERL_JAX_CACHE", str(tmp_path / "cache"))


def folder_of(folder: pathlib.Path, **splits: Sequence[Mapping[str, Any]]) -> DataConfig:
    """A data set with a file for each split that has rows."""
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataConfig(task="jsonl", data_dir=str(folder))


def pairs(name: str, weight: float = 1.0, number: int = 2) -> list[dict]:
    return [
        {"prompt": f"{name} {i}", "chosen": "yes", "rejected": "no", "weight": weight}
        for i in range(number)
    ]


def labels(name: str, *values: float) -> list[dict]:
    return [
        {"prompt": f"{name} {i}", "response": "yes", "label": value}
        for i, value in enumerate(values)
    ]


def ratings(name: str, *values: float) -> list[dict]:
    return [
        {"prompt": f"{name} {i}", "response": "yes", "rating": value}
        for i, value in enumerate(values)
    ]


def answers(name: str) -> list[dict]:
    return [{"prompt": f"{name} {i}", "response": "yes"} for i in range(2)]


PAIRS = {split: pairs(split) for split in ("train", "validation", "test")}
LABELS = {split: labels(split, 0, 1) for split in ("train", "validation", "test")}
RATINGS = {split: ratings(split, 0, 1) for split in ("train", "validation", "test")}
POINTWISE, REGRESSION = {"objective": "pointwise"}, {"objective": "regression"}


def without(rows: Mapping[str, Any], split: str) -> dict[str, Any]:
    return {name: part for name, part in rows.items() if name != split}


REFUSED = {
    "reward without test": (
        RewardCommand,
        {},
        without(PAIRS, "test"),
        "no comparisons rows in its test split",
    ),
    "reward without validation": (
        RewardCommand,
        {},
        without(PAIRS, "validation"),
        "no comparisons rows in its validation split",
    ),
    "reward, test of weight 0": (
        RewardCommand,
        {},
        PAIRS | {"test": pairs("test", 0.0)},
        "Every comparison of the test split of jsonl has weight 0",
    ),
    "reward, train of weight 0": (
        RewardCommand,
        {},
        PAIRS | {"train": pairs("train", 0.0)},
        "Every comparison of the train split of jsonl has weight 0",
    ),
    "labels, test of one class": (
        RewardCommand,
        POINTWISE,
        LABELS | {"test": labels("test", 1, 1)},
        "The test split of jsonl has labels of one class",
    ),
    "labels, train of one class": (
        RewardCommand,
        POINTWISE,
        LABELS | {"train": labels("train", 0, 0)},
        "The train split of jsonl has labels of one class",
    ),
    "ratings, one test row": (
        RewardCommand,
        REGRESSION,
        RATINGS | {"test": ratings("test", 3)},
        "The test split of jsonl has one rating only, 3",
    ),
    "dpo without test": (
        DPOCommand,
        {},
        without(PAIRS, "test"),
        "no comparisons rows in its test split",
    ),
    "dpo, test of weight 0": (
        DPOCommand,
        {},
        PAIRS | {"test": pairs("test", 0.0)},
        "Every comparison of the test split of jsonl has weight 0",
    ),
    "sft without validation": (
        SFTCommand,
        {},
        {"train": answers("train"), "test": answers("test")},
        "no demonstrations rows in its validation split",
    ),
    "rl without train": (
        RLCommand,
        {"reward": ("-",)},
        {"test": answers("test")},
        "no prompts rows in its train split",
    ),
}
RUN = {
    RewardCommand: commands.run_reward,
    DPOCommand: commands.run_dpo,
    SFTCommand: commands.run_sft,
    RLCommand: commands.run_rl,
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_split_that_a_job_could_not_use_is_refused_before_the_model_is_loaded(
    case, tmp_path, monkeypatch
):
    make, fields, splits, message = REFUSED[case]
    monkeypatch.setattr(commands, "load_model", None)
    with pytest.raises(UserError) as error:
        RUN[make](
            make(run=str(tmp_path / "run"), model="-", data=folder_of(tmp_path, **splits), **fields)
        )
    assert message in str(error.value)


def test_a_base_without_validation_is_refused_before_a_tokenizer_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(base_lib, "_tokenizer", None)
    data = folder_of(tmp_path, train=[{"text": "one two"}])
    with pytest.raises(UserError, match="no corpus rows in its validation split"):
        base_lib.train_base(
            base_lib.BaseConfig(run=str(tmp_path / "run"), model=str(tmp_path / "model"), data=data)
        )


def test_prompts_that_two_splits_share_are_said_with_their_number(tmp_path, capsys):
    twice = [{"prompt": "a", "response": "1"}, {"prompt": "b", "response": "2"}]
    # Several answers to a prompt count once, and so does a space at its end.
    data = folder_of(
        tmp_path,
        train=[*twice, {"prompt": "c", "response": "3"}],
        validation=[{"prompt": "b ", "response": "4"}, {"prompt": "b", "response": "5"}],
        test=[*twice, {"prompt": "d", "response": "6"}],
    )
    assert tuple(of_task(data, "demonstrations", ("train", "validation")).splits) == (
        "train",
        "validation",
        "test",
    )
    assert capsys.readouterr().out.splitlines() == [
        "jsonl: the splits train and validation share 1 of the latter's 1 prompts, such as 'b'; "
        "neither is held out from the other there.",
        "jsonl: the splits train and test share 2 of the latter's 3 prompts, such as 'a'; neither "
        "is held out from the other there.",
        "jsonl: the splits validation and test share 1 of the latter's 3 prompts, such as 'b'; "
        "neither is held out from the other there.",
    ]


def test_groups_that_two_splits_share_are_said_too(tmp_path, capsys):
    """Two turns of one dialogue have different prompts."""
    row = lambda prompt, **group: {"prompt": prompt, **group}
    data = folder_of(
        tmp_path,
        train=[row("a", group=7), row("b")],
        test=[row("c", group="7"), row("d", group="8"), row("e")],
    )
    of_task(data, "prompts", ("train",))
    assert capsys.readouterr().out.splitlines() == [
        "jsonl: the splits train and test share 1 of the latter's 2 groups, such as '7'; neither "
        "is held out from the other there.",
    ]


def test_splits_apart_are_not_mentioned_and_one_that_nobody_needs_may_be_missing(tmp_path, capsys):
    one = of_task(folder_of(tmp_path, train=answers("train")), "prompts", ("train",))
    assert tuple(one.splits) == ("train",)
    all_splits = of_task(
        DataConfig(task=ORDERS, train_size=8, evaluation_size=8), "prompts", ("train",)
    ).splits
    assert tuple(all_splits) == ("train", "validation", "test")
    assert capsys.readouterr().out == ""


def test_a_long_prompt_is_shown_by_its_beginning():
    prompt = "x" * 200
    assert (
        f"'{'x' * 80}…'"
        in shared("t", "prompts", {"train": {prompt: None}, "test": {prompt: None}})[0]
    )
