"""Reward models of Taskmaster beside bag-of-words baselines, with intervals over dialogues."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest

from experiments.taskmaster import run as taskmaster
from experiments.taskmaster.data import TICKETING
from perl_jax.data.config import DataConfig
from perl_jax.evaluation import statistics

DATA = pathlib.Path(__file__).parents[2] / "experiments" / "taskmaster" / "data.py"
WORDS = ("yes", "no", "maybe", "later", "never", "always")


def turns(film: int, said: int, noise: np.random.Generator) -> dict:
    """A rated turn after `said` turns of one dialogue: "yes" is rated up mostly."""
    context = [{"role": "user", "text": f"film {film}"}] + [
        {"role": "agent", "text": f"word {i}"} for i in range(said)
    ]
    words = noise.choice(WORDS, 3)
    up = ("yes" in words) ^ (noise.random() < 0.2)
    return {
        "context": json.dumps(context),
        "generation": json.dumps({"role": "agent", "text": " ".join(words)}),
        "reward": int(up),
    }


def test_the_baselines_and_the_reward_model_are_compared_over_dialogues(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("PERL_JAX_CACHE", str(tmp_path / "cache"))
    noise = np.random.default_rng(0)
    folder = tmp_path / "data" / "TM-3-2020" / "reward"
    folder.mkdir(parents=True)
    rows = [turns(film, said, noise) for film in range(80) for said in range(4)]
    (folder / "reward_00.json").write_text(json.dumps(rows))
    test = list(TICKETING.open("labels", "test", DataConfig(data_dir=str(tmp_path / "data"))))
    labels, dialogues = np.array([row["label"] for row in test]), [row["group"] for row in test]
    scores = labels + noise.normal(size=len(labels))
    run: pathlib.Path = tmp_path / "run" / "lora" / "reward"
    run.mkdir(parents=True)
    # An evaluation of an older version, whose AUC is a number.
    (run / "evaluation.json").write_text(json.dumps({"auc": 0.5, "ece": 0.1}))
    (run / "scores.json").write_text(json.dumps({"score": scores.tolist()}))
    taskmaster.add_baseline(tmp_path / "run", f"{DATA}:TICKETING", str(tmp_path / "data"))
    found = json.loads((run / "evaluation.json").read_text())
    assert (
        found["auc"]["value"] == pytest.approx(statistics.auc(scores, labels))
        and found["ece"] == 0.1
    )
    assert (found["auc"]["n"], found["auc"]["groups"]) == (len(test), len(test) // 4) and found[
        "auc"
    ]["low"] < found["auc"]["high"]
    for name, values in found["baselines"].items():
        difference = values["auc_difference"]
        assert difference["value"] == pytest.approx(
            found["auc"]["value"] - values["auc"]["value"]
        ), name
        assert difference["low"] < difference["value"] < difference["high"] and difference[
            "groups"
        ] == len(set(dialogues))
    # Words that decide the rating are found.
    assert found["baselines"]["bag of words, response"]["auc"]["low"] > 0.5
    assert f"{len(test)} turns of {len(test) // 4} dialogues" in capsys.readouterr().out
