"""One text, one score: a trainer that renders whole conversations, a row of data, the `score`
command and a rollout agree.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

import jax
import numpy as np
import pytest

from perl_jax.data.config import DataConfig
from perl_jax.data.pipeline import make_batches
from perl_jax.evaluation.score import ScoreConfig, score
from perl_jax.generation.sampling import Rollout
from perl_jax.hub import import_peft
from perl_jax.hub.model import Model
from perl_jax.hub.tokenizer import Tokenizer
from perl_jax.rewards import scoring
from perl_jax.rewards.models import RewardTotal
from perl_jax.training import reward
from perl_jax.types import Tokens
from tests.hub.test_chat import CHATML, GEMMAS, LINE, byte_tokenizer
from tests.hub.test_families import write_random
from tests.paths import SMOLLM
from tests.training.test_exchange import load, write_peft

ROWS = [
    {"prompt": "What is it?", "chosen": "A cat, I think.", "rejected": "No."},
    {
        "prompt": "Is that one large?",
        "chosen": "It is.",
        "rejected": "A very large cat with a hat.",
    },
]
LONGEST = 40


def tokenizer_of(name: str) -> Tokenizer:
    if name != "smollm2":
        return byte_tokenizer({"chatml": CHATML, "two stops": LINE, "gemma": GEMMAS}[name])
    if SMOLLM is None or not SMOLLM.is_dir():
        pytest.skip("no SmolLM2 here")
    return Tokenizer.load(SMOLLM)


def random_classifier(model: Model, folder: pathlib.Path) -> Any:
    """A base with a LoRA pair and a scalar head, saved by PEFT; its scores are of a size that
    differs from text to text.
    """
    torch = pytest.importorskip("torch")
    classifier = write_peft(model, folder, head=True, target_modules=["q_proj", "v_proj"], r=2)
    with torch.no_grad():
        for name, parameter in classifier.named_parameters():
            if "score" in name:
                parameter.mul_(20)
    classifier.save_pretrained(folder)
    return classifier


def trainer_scores(classifier: Any, tokenizer: Tokenizer) -> np.ndarray:
    """[row, chosen or rejected]: the classifier's logit of each conversation as the tokenizer's own
    template renders it.
    """
    torch = pytest.importorskip("torch")

    def one(prompt: str, response: str) -> float:
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        ids = torch.tensor([tokenizer.inner.apply_chat_template(turns, return_dict=False)])
        with torch.no_grad():
            return classifier(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.item()

    return np.array(
        [[one(row["prompt"], row[side]) for side in ("chosen", "rejected")] for row in ROWS]
    )


def rollout_of(tokenizer: Tokenizer, ended: dict[str, list[int]], room: int = LONGEST) -> Rollout:
    """Every response of ROWS, sampled with each of the ends, as the sampler lays them out: prompts
    padded on the left.
    """
    prompts, responses = [], []
    for row in ROWS:
        for side in ("chosen", "rejected"):
            for end in ended.values():
                prompts.append(tokenizer.prompt_ids(row["prompt"]))
                responses.append(
                    (tokenizer.without_end(tokenizer.response_ids(row[side])) + end)[:room]
                )
    width = max(map(len, prompts))
    tokens_BT = np.full((len(prompts), width + room), tokenizer.pad_id, np.int32)
    valid_BT, response_BT = np.zeros(tokens_BT.shape, bool), np.zeros(tokens_BT.shape, bool)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        tokens_BT[row, width - len(prompt) : width + len(response)] = prompt + response
        valid_BT[row, width - len(prompt) : width + len(response)] = True
        response_BT[row, width : width + len(response)] = True
    finished_B = np.array(
        [bool(response) and response[-1] in tokenizer.stop_ids for response in responses]
    )
    return Rollout(
        Tokens(tokens_BT, valid_BT, response_BT),
        np.zeros(tokens_BT.shape, np.float32),
        finished_B,
        np.int32(room),
    )


def rollout_scores(model: Model, artefact: pathlib.Path, rollout: Rollout) -> np.ndarray:
    """What the RL loop pays, with nothing but the reward model."""
    rewards = RewardTotal((artefact,)).loaded(model)
    program = scoring.reward_program(model, rewards.records, rewards.combine)
    scorer = scoring.Scorer(model, program, rewards.terms, rewards.weight, ROWS)
    return np.array(
        jax.device_get(
            scorer(rewards.roles, rollout, np.zeros(len(rollout.finished_B), np.int32))[0]
        )
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["chatml", "two stops", pytest.param("gemma", marks=pytest.mark.exhaustive), "smollm2"]
)
def test_a_trainers_score_is_that_of_rows_of_the_command_and_of_rollouts(name, tmp_path):
    """A random sequence classifier that PEFT saved, imported by `perl-jax import`."""
    tokenizer = tokenizer_of(name)
    write_random(
        tmp_path / "base",
        "llama",
        vocab_size=-(-len(tokenizer) // 8) * 8,
        max_position_embeddings=128,
    )
    tokenizer.save(tmp_path / "base")
    model = load(tmp_path / "base")
    classifier = random_classifier(model, tmp_path / "peft")
    artefact = import_peft.run_import(
        import_peft.ImportConfig(
            model=model.name, peft=str(tmp_path / "peft"), to=str(tmp_path / "reward")
        )
    )
    adapter, record = model.load_role(artefact, "reward")
    assert (record.score_mean, record.score_std, record.turn_end) == (
        0.0,
        1.0,
        tokenizer.turn_end_ids,
    )
    expected = trainer_scores(classifier, tokenizer)
    assert expected.std() > 0.1
    # Rows of data, in training and in evaluation.
    data = DataConfig(max_prompt_length=LONGEST, max_response_length=LONGEST)
    scores = reward.score_batches(
        model,
        adapter,
        make_batches(ROWS, "comparisons", model.tokenizer, data, 2, seed=None, epochs=1),
    )
    np.testing.assert_allclose(np.stack(scores, axis=1), expected, atol=1e-4)
    # The score command.
    lines = [
        json.dumps({"prompt": row["prompt"], "response": row[side]})
        for row in ROWS
        for side in ("chosen", "rejected")
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    by_command = score(
        ScoreConfig(
            model=model.name,
            input=str(tmp_path / "rows.jsonl"),
            adapter=str(artefact),
            batch_size=4,
        )
    )
    np.testing.assert_allclose(
        [row["score"] for row in by_command], expected.reshape(-1), atol=1e-4
    )
    # Rollouts: ended by the turn's end, by its last token, by eos.
    stop = list(tokenizer.stop_part)
    ended = {"turn": stop, "last": stop[-1:], "eos": [tokenizer.eos_id]}
    found = rollout_scores(model, artefact, rollout_of(tokenizer, ended)).reshape(2, 2, 3)
    np.testing.assert_allclose(found, np.repeat(expected[..., None], 3, axis=2), atol=1e-4)
    # Unfinished ones, as a row of data that was cut: no end is put in their place.
    data = DataConfig(max_prompt_length=LONGEST, max_response_length=2)
    cut = np.stack(
        reward.score_batches(
            model,
            adapter,
            make_batches(ROWS, "comparisons", model.tokenizer, data, 2, seed=None, epochs=1),
        ),
        axis=1,
    )
    unended = rollout_scores(model, artefact, rollout_of(tokenizer, {"none": []}, room=2)).reshape(
        2, 2
    )
    np.testing.assert_allclose(unended, cut, atol=1e-4)
    assert np.abs(unended - expected).max() > 0.05
